// Decode, second part, where there is more than one split: one warp a row
// (sequence, query, head) adds the splits' partial results and the prefix's.
#pragma once

#include "sm80/decode/decode.h"

namespace lak::sm80 {

template <class T, int kHeadDim>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(const __grid_constant__ ZeroGateParams params, int splits, int row_tiles) {
  constexpr int kPerLane = kHeadDim / 32;
  const int lane = lane_id(), head_dim = static_cast<int>(params.head_dim);
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + warp_id();
  if (index >= params.batch * params.heads_q * params.seq_q) return; // a whole warp at a time
  const int query = static_cast<int>(index % params.seq_q), head = static_cast<int>(index / params.seq_q % params.heads_q);
  const int b = static_cast<int>(index / params.seq_q / params.heads_q);
  const int group = static_cast<int>(params.heads_q / params.heads_kv), head_kv = head / group;
  const Sequence s = sequence_of(params, b);

  const DecodePartials partials(params, splits, row_tiles);
  const int row = query * group + head % group;
  const int64_t tile = (static_cast<int64_t>(b) * params.heads_kv + head_kv) * row_tiles + row / kDecodeRows;
  const int64_t first = tile * splits * kDecodeRows + row % kDecodeRows;
  float most = -kInfinity, total = 0.0f, output[kPerLane] = {};
  for (int split = 0; split < splits; ++split) {
    const int64_t at = first + static_cast<int64_t>(split) * kDecodeRows;
    const float largest = ptx::load_global(partials.largest + at);
    if (largest == -kInfinity) continue; // nothing of this split is visible; the whole warp agrees
    const float new_most = fmaxf(most, largest);
    const float old_weight = ptx::exp2_fast(most - new_most), weight = ptx::exp2_fast(largest - new_most);
    total = total * old_weight + weight * ptx::load_global(partials.total + at);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int column = i * 32 + lane;
      const float part = column < head_dim ? ptx::load_global(partials.output + at * head_dim + column) : 0.0f;
      output[i] = output[i] * old_weight + weight * part;
    }
    most = new_most;
  }
  const float factor = total > 0.0f ? 1.0f / total : 0.0f;

  const float gate = gate_of(params, s, head);
  T* result = head_pointer<T>(params.output, b, head, query);
  const float* prefix = partials.prefix + (tile * kDecodeRows + row % kDecodeRows) * head_dim;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int column = i * 32 + lane;
    if (column >= head_dim) continue;
    const float sum = output[i] * factor + (s.slots > 0 ? ptx::load_global(prefix + column) : 0.0f);
    ptx::store_global(result + column, ptx::narrow<T>(s.bad_prefix ? gate : sum));
  }
}

} // namespace lak::sm80
