// The order of backward's kernels. Only what is asked for is computed: without gradients of Q, K and V nothing quadratic runs.
#pragma once

#include "sm80/backward/keys.h"
#include "sm80/backward/prefix.h"
#include "sm80/backward/queries.h"
#include "sm80/backward/rows.h"
#include "sm80/backward/sums.h"
#include "sm80/launchers.h"
#include "sm80/zero_tail.h"

namespace lak::sm80 {

template <class T, int kHeadDim, bool kElementwise, bool kAddQueryGradient>
int launch_backward_keys(const ZeroGateParams& p, cudaStream_t stream) {
  const int64_t key_blocks = ceil_div(p.seq_k, KeyGradientTiles<T, kHeadDim>::kKeys);
  return launch<backward_keys_kernel<T, kHeadDim, kElementwise, kAddQueryGradient>,
                KeyGradientMemory<T, kHeadDim, kAddQueryGradient>::kBytes>(
      key_blocks * p.heads_kv * p.batch, 32 * kBackwardWarps<T, kHeadDim>, stream, p, static_cast<int>(key_blocks));
}

template <class T, int kHeadDim, bool kElementwise>
int launch_backward_queries(const ZeroGateParams& p, cudaStream_t stream) {
  const int64_t row_blocks = ceil_div(p.seq_q, QueryGradientTiles<T, kHeadDim>::kRows);
  return launch<backward_queries_kernel<T, kHeadDim, kElementwise>, kQueryGradientBytes<T, kHeadDim>>(
      row_blocks * p.heads_q * p.batch, 32 * kBackwardWarps<T, kHeadDim>, stream, p, static_cast<int>(row_blocks));
}

template <class T, int kHeadDim>
int launch_backward(const ZeroGateParams& p, cudaStream_t stream) {
  constexpr int kThreadsHere = 32 * kBackwardWarps<T, kHeadDim>;
  const BackwardWorkspace workspace = backward_workspace<T, kHeadDim>(p);
  if (workspace.bytes > 0 && p.workspace == nullptr) return kLakNoWorkspace;
  const bool keys = p.dkey.data != nullptr, queries = p.dquery.data != nullptr, prefix = p.dgate != nullptr;
  const bool elementwise = !kIsTuned<T, kHeadDim> || needs_elementwise_scores(p);

  int code = launch<backward_rows_kernel<T, kHeadDim>, kRowsKernelBytes<T, kHeadDim>>(
      static_cast<int64_t>(workspace.row_blocks) * p.heads_q * p.batch, kThreadsHere, stream, p);
  if (code != kLakSuccess) return code;
  if (prefix) {
    const int64_t slot_tiles = ceil_div(p.prefix_length, 16), splits = workspace.parts / kBackwardWarps<T, kHeadDim>;
    code = launch<backward_prefix_kernel<T, kHeadDim>, kPrefixKernelBytes<T, kHeadDim>>(
        splits * slot_tiles * p.heads_q * p.batch, kThreadsHere, stream, p, static_cast<int>(slot_tiles));
    if (code != kLakSuccess) return code;
    const int64_t elements = p.prefix_count * p.heads_kv * p.prefix_length * p.head_dim;
    code = launch<sum_prefix_kernel<T, kHeadDim>>(ceil_div(elements, kSumThreads), kSumThreads, stream, p);
    if (code != kLakSuccess) return code;
    code = launch<sum_gate_kernel<T, kHeadDim>>(p.prefix_count * p.heads_q, 32, stream, p);
    if (code != kLakSuccess) return code;
  }

  // One pass with atomics for all three where that is fast and its order may vary; else one kernel for each owner.
  const bool together = kIsTuned<T, kHeadDim> && keys && queries && !elementwise && p.deterministic == 0;
  if (together) {
    if constexpr (kIsTuned<T, kHeadDim>) {
      code = launch_backward_keys<T, kHeadDim, false, true>(p, stream);
      if (code != kLakSuccess) return code;
    }
    const int64_t pairs = (p.cu_seqlens_q != nullptr ? 1 : p.batch) * p.heads_q * p.total_q * (p.head_dim / 2);
    code = launch<convert_dquery_kernel<T, kHeadDim>>(ceil_div(pairs, kSumThreads), kSumThreads, stream, p);
    if (code != kLakSuccess) return code;
  } else {
    if constexpr (kIsTuned<T, kHeadDim>) {
      if (keys && !elementwise) code = launch_backward_keys<T, kHeadDim, false, false>(p, stream);
      if (code == kLakSuccess && queries && !elementwise) code = launch_backward_queries<T, kHeadDim, false>(p, stream);
      if (code != kLakSuccess) return code;
    }
    if (keys && elementwise) code = launch_backward_keys<T, kHeadDim, true, false>(p, stream);
    if (code == kLakSuccess && queries && elementwise) code = launch_backward_queries<T, kHeadDim, true>(p, stream);
    if (code != kLakSuccess) return code;
  }

  if (p.cu_seqlens_q == nullptr) return kLakSuccess;
  Tails tails{};
  tails.add(p.dquery, p.total_q, p.heads_q, p.cu_seqlens_q + p.batch);
  tails.add(p.dkey, p.total_k, p.heads_kv, p.cu_seqlens_k + p.batch);
  tails.add(p.dvalue, p.total_k, p.heads_kv, p.cu_seqlens_k + p.batch);
  return launch_zero_tail<T>(tails, p.head_dim, stream);
}

}  // namespace lak::sm80
