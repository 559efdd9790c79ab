// Backward, first kernel: what each row contributes by itself, linear in the sequence.
//
//   D_p = rowsum(P_p * (dO Vp^T))   D_w = rowsum(dO * O) - gate D_p   dgate partial = sum of D_p over the block's rows
//   dQ begins as the prefix's part: gate P_p * (dO Vp^T - D_p) Kp      (times `scale` at the very end)
//
// A warp owns 16 rows. Shared memory: Q, dO [16 x warps, D], prefix K, V [16, D], one float a warp.
#pragma once

#include "sm80/backward/exact.h"
#include "sm80/backward/workspace.h"
#include "sm80/scores.h"

namespace lak::sm80 {

template <class T, int kHeadDim>
constexpr int kRowsKernelBytes =
    (2 * 16 * kBackwardWarps<T, kHeadDim> + 2 * kPrefixTile) * kHeadDim * static_cast<int>(sizeof(T)) + 16;

template <class T, int kHeadDim>
__global__ void __launch_bounds__(32 * kBackwardWarps<T, kHeadDim>)
    backward_rows_kernel(const __grid_constant__ ZeroGateParams p) {
  constexpr int kWarpsHere = kBackwardWarps<T, kHeadDim>, kRows = 16 * kWarpsHere, kD = kHeadDim / 8;
  const BackwardWorkspace workspace = backward_workspace<T, kHeadDim>(p);
  SharedTile<T, kRows, kHeadDim> query{ptx::dynamic_shared_memory()}, doutput{query.base + query.kBytes};
  SharedTile<T, kPrefixTile, kHeadDim> prefix_key{doutput.base + doutput.kBytes},
      prefix_value{prefix_key.base + prefix_key.kBytes};
  const uint32_t sums = prefix_value.base + prefix_value.kBytes;

  const int block = static_cast<int>(blockIdx.x % workspace.row_blocks);
  const int head = static_cast<int>(blockIdx.x / workspace.row_blocks % p.heads_q);
  const int b = static_cast<int>(blockIdx.x / workspace.row_blocks / p.heads_q);
  const Sequence s = sequence_of(p, b);
  const int thread = threadIdx.x, lane = lane_id(), head_dim = static_cast<int>(p.head_dim);
  const int first_row = block * kRows, warp_row = warp_id() * 16;
  float* dgate = p.dgate == nullptr ? nullptr : workspace.dgate + blockIdx.x;
  if (first_row >= s.queries) {
    if (dgate != nullptr && thread == 0) ptx::store_global(dgate, 0.0f);
    return;
  }
  const int head_kv = head / static_cast<int>(p.heads_q / p.heads_kv);
  constexpr int kThreadsHere = 32 * kWarpsHere;
  const T* keys = head_pointer<const T>(p.prefix_key, s.prefix, head_kv, 0);
  const T* values = head_pointer<const T>(p.prefix_value, s.prefix, head_kv, 0);
  const auto copy_prefix = [&](int slot) {
    copy_rows<kThreadsHere>(prefix_key, keys, p.prefix_key.stride_row, slot, 0, s.slots, head_dim, thread);
    copy_rows<kThreadsHere>(prefix_value, values, p.prefix_value.stride_row, slot, 0, s.slots, head_dim, thread);
    ptx::commit_async_copies();
    ptx::wait_async_copies<0>();
    __syncthreads();
  };
  const T* query_rows = head_pointer<const T>(p.query, b, head, s.first_query);
  const T* doutput_rows = head_pointer<const T>(p.doutput, b, head, s.first_query);
  const T* output_rows = head_pointer<const T>(p.output, b, head, s.first_query);
  copy_rows<kThreadsHere>(query, query_rows, p.query.stride_row, first_row, 0, s.queries, head_dim, thread);
  copy_rows<kThreadsHere>(doutput, doutput_rows, p.doutput.stride_row, first_row, 0, s.queries, head_dim, thread);
  copy_prefix(0);

  const ScoreRule rule = score_rule(p, b, head);
  const bool elementwise = !kIsTuned<T, kHeadDim> || needs_elementwise_scores(p);
  const float before = elementwise ? rule.scale_log2 : 1.0f, factor = elementwise ? 1.0f : rule.scale_log2;
  const float gate = gate_of(p, s, head);
  float c[1][2][4], d[1][2][4];  // prefix scores, dO Vp^T
  const auto scores = [&](int slot) {
    set_zero(c);
    set_zero(d);
    multiply_abt(c, query, warp_row, prefix_key, 0);
    multiply_abt(d, doutput, warp_row, prefix_value, 0);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        c[0][n][e] = slot + 8 * n + lane % 4 * 2 + e % 2 < s.slots ? c[0][n][e] * before : -kInfinity;
      }
    }
  };
  RunningSoftmax prefix;
  for (int slot = 0; slot < s.slots; slot += kPrefixTile) {
    if (slot > 0) {
      __syncthreads();
      copy_prefix(slot);
    }
    scores(slot);
    prefix.add(c[0], d[0], factor);
  }
  prefix.finish();

  // D_w from the saved output where that is exact enough, else from the keys.
  const int64_t statistics = statistic_row(p, s, b, head);
  const RowsOfWarp rows{p, s, rule, b, head_kv, first_row + warp_row + lane / 4, elementwise};
  float prefix_delta[2], delta[2] = {0.0f, 0.0f}, logsumexp[2] = {-kInfinity, -kInfinity};
  bool there[2], few[2], from_keys[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = rows.row + 8 * half;
    there[half] = row < s.queries;
    prefix_delta[half] = s.slots > 0 ? prefix.weighted[half] / prefix.total[half] : 0.0f;
    if (there[half]) {
      logsumexp[half] = ptx::load_global(static_cast<const float*>(p.logsumexp.data) + statistics + row);
      for (int column = lane % 4 * 2; column < head_dim; column += 8) {
        const float2 x = load_pair(doutput_rows + row * p.doutput.stride_row + column);
        const float2 y = load_pair(output_rows + row * p.output.stride_row + column);
        delta[half] = fmaf(x.y, y.y, fmaf(x.x, y.x, delta[half]));
      }
    }
    delta[half] = row_sum(delta[half]) - gate * prefix_delta[half];
    few[half] = visible_end(s, row) - s.key_begin <= kFewKeys;
  }
  if (p.mask.type != MaskType::kNone) find_few_keys(rows, there, few);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const bool any_key = logsumexp[half] != -kInfinity, fits = fabsf(delta[half]) < kInfinity;
    const bool coarse = fabsf(logsumexp[half]) > kCoarseLogsumexp<T>;
    from_keys[half] = there[half] && any_key && !s.bad_prefix && (few[half] || coarse || !fits);
  }
  RunningSoftmax words;
  if (__any_sync(kAllLanes, from_keys[0] || from_keys[1])) words = softmax_of_words(rows, query, doutput, warp_row, from_keys);

  float in_warp = 0.0f;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = rows.row + 8 * half;
    if (!there[half] || lane % 4 != 0) continue;
    float shift = 0.0f, rest = 0.0f;
    if (from_keys[half]) {
      delta[half] = words.weighted[half] / words.total[half];
      shift = words.largest[half];
      rest = ptx::log2_fast(words.total[half]);
      if (kIsHalf<T>) shift += rest / factor;
    } else if (logsumexp[half] != -kInfinity) {
      const double exact = logsumexp[half] * kLog2E;
      shift = static_cast<float>(exact / factor);
      rest = static_cast<float>(exact - static_cast<double>(shift) * factor);
    }
    ptx::store_global(workspace.shift + statistics + row, shift);
    if (!kIsHalf<T>) ptx::store_global(workspace.rest + statistics + row, rest);
    ptx::store_global(workspace.delta + statistics + row, delta[half]);
    const float prefix_shift = s.slots > 0 ? prefix.largest[half] + ptx::log2_fast(prefix.total[half]) / factor : 0.0f;
    ptx::store_global(workspace.prefix_shift + statistics + row, prefix_shift);
    ptx::store_global(workspace.prefix_delta + statistics + row, prefix_delta[half]);
    in_warp += prefix_delta[half];
  }
  if (dgate != nullptr) {  // in a fixed order: lanes, then warps
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) in_warp += __shfl_xor_sync(kAllLanes, in_warp, lanes);
    if (lane == 0) ptx::store_shared(sums + warp_id() * 4, in_warp);
    __syncthreads();
    if (thread == 0) {
      float in_block = 0.0f;
      for (int w = 0; w < kWarpsHere; ++w) in_block += ptx::load_shared<float>(sums + w * 4);
      ptx::store_global(dgate, in_block);
    }
  }
  if (p.dquery.data == nullptr) return;

  const float part[2] = {gate / prefix.total[0], gate / prefix.total[1]};
  float dquery[1][kD][4];
  set_zero(dquery);
  for (int slot = 0; slot < s.slots; slot += kPrefixTile) {
    if (s.slots > kPrefixTile) {
      __syncthreads();
      copy_prefix(slot);
      scores(slot);
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float weight = ptx::exp2_fast((c[0][n][e] - prefix.largest[e / 2]) * factor) * part[e / 2];
        c[0][n][e] = weight * (d[0][n][e] - prefix_delta[e / 2]);
      }
    }
    multiply_pb(dquery, c, prefix_key, 0);
  }
  store_rows<kD>(workspace.dquery + statistics * head_dim, head_dim, first_row + warp_row, s.queries, dquery[0],
                 s.bad_prefix ? gate : 1.0f, 0, head_dim);
}

}  // namespace lak::sm80
