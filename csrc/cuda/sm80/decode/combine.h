// Decode, second part: one warp a row (sequence, query, head) adds the splits' partial results and the prefix, once.
#pragma once

#include "sm80/decode/decode.h"

namespace lak::sm80 {

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
  return x;
}

template <class T, int kHeadDim>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(const __grid_constant__ ZeroGateParams p, int splits, int row_tiles) {
  constexpr int kPerLane = kHeadDim / 32;
  const int lane = lane_id(), head_dim = static_cast<int>(p.head_dim);
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + warp_id();
  if (index >= p.batch * p.heads_q * p.seq_q) return;  // a whole warp at a time
  const int query = static_cast<int>(index % p.seq_q), head = static_cast<int>(index / p.seq_q % p.heads_q);
  const int b = static_cast<int>(index / p.seq_q / p.heads_q);
  const int group = static_cast<int>(p.heads_q / p.heads_kv), head_kv = head / group;
  const Sequence s = sequence_of(p, b);

  const DecodePartials partials(p, splits, row_tiles);
  const int row = query * group + head % group;
  const int64_t tile = (static_cast<int64_t>(b) * p.heads_kv + head_kv) * row_tiles + row / kDecodeRows;
  const int64_t first = tile * splits * kDecodeRows + row % kDecodeRows;
  float most = -kInfinity, total = 0.0f, output[kPerLane] = {};
  for (int split = 0; split < splits; ++split) {
    const int64_t at = first + static_cast<int64_t>(split) * kDecodeRows;
    const float largest = ptx::load_global(partials.largest + at);
    if (largest == -kInfinity) continue;  // nothing of this split is visible; the whole warp agrees
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

  const float gate = gate_of(p, s, head);
  float prefix_max = -kInfinity, prefix_total = 0.0f, prefix_output[kPerLane] = {}, q[kPerLane];
  if (s.slots > 0) {
    const T* row_query = head_pointer<const T>(p.query, b, head, query);
    const T* key = head_pointer<const T>(p.prefix_key, s.prefix, head_kv, 0);
    const T* value = head_pointer<const T>(p.prefix_value, s.prefix, head_kv, 0);
    const float scale_log2 = score_rule(p, b, 0).scale_log2;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int column = i * 32 + lane;
      q[i] = column < head_dim ? ptx::widen(ptx::load_global(row_query + column)) : 0.0f;
    }
    for (int slot = 0; slot < s.slots; ++slot) {
      float product = 0.0f;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const int column = i * 32 + lane;
        if (column < head_dim)
          product = fmaf(q[i], ptx::widen(ptx::load_global(key + slot * p.prefix_key.stride_row + column)), product);
      }
      const float logit = warp_sum(product) * scale_log2;
      const float new_max = fmaxf(prefix_max, logit);
      const float old_weight = ptx::exp2_fast(prefix_max - new_max), weight = ptx::exp2_fast(logit - new_max);
      prefix_total = prefix_total * old_weight + weight;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const int column = i * 32 + lane;
        const float v =
            column < head_dim ? ptx::widen(ptx::load_global(value + slot * p.prefix_value.stride_row + column)) : 0.0f;
        prefix_output[i] = prefix_output[i] * old_weight + weight * v;
      }
      prefix_max = new_max;
    }
  }
  const float prefix_factor = s.slots > 0 ? gate / prefix_total : 0.0f;
  T* result = head_pointer<T>(p.output, b, head, query);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int column = i * 32 + lane;
    const float sum = output[i] * factor + prefix_output[i] * prefix_factor;
    if (column < head_dim) ptx::store_global(result + column, ptx::narrow<T>(s.bad_prefix ? gate : sum));
  }
}

}  // namespace lak::sm80
