// Backward, first kernel: what each row contributes by itself, linear in the sequence.
//
//   D_p = rowsum(P_p * (dO Vp^T))   D_w = rowsum(dO * O) - gate D_p   dgate partial = sum of D_p over the block's rows
//   dQ begins as the prefix's part: gate P_p * (dO Vp^T - D_p) Kp      (times `scale` at the very end)
//
// A warp owns 16 rows. Shared memory: Q, dO [16 x warps, D], prefix K, V [16, D], one float a warp.
#pragma once

#include "sm80/backward/workspace.h"
#include "sm80/scores.h"

namespace lak::sm80 {

template <class T, int kHeadDim>
constexpr int kRowsKernelBytes =
    (2 * 16 * kBackwardWarps<T, kHeadDim> + 2 * kPrefixTile) * kHeadDim * static_cast<int>(sizeof(T)) + 16;

template <class T>
__device__ __forceinline__ float2 load_pair(const T* address) {
  if constexpr (kIsHalf<T>) {
    const uint32_t pair = ptx::load_global(reinterpret_cast<const uint32_t*>(address));
    return {ptx::widen(T{static_cast<uint16_t>(pair)}), ptx::widen(T{static_cast<uint16_t>(pair >> 16)})};
  } else {
    return ptx::load_global(reinterpret_cast<const float2*>(address));
  }
}

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

  const float scale_log2 = score_rule(p, b, head).scale_log2, gate = gate_of(p, s, head);
  float c[1][2][4], d[1][2][4];  // prefix scores, dO Vp^T
  float largest[2] = {-kInfinity, -kInfinity}, total[2] = {}, weighted[2] = {};
  const auto scores = [&](int slot) {
    set_zero(c);
    set_zero(d);
    multiply_abt(c, query, warp_row, prefix_key, 0);
    multiply_abt(d, doutput, warp_row, prefix_value, 0);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        c[0][n][e] = slot + 8 * n + lane % 4 * 2 + e % 2 < s.slots ? c[0][n][e] * scale_log2 : -kInfinity;
      }
    }
  };
  for (int slot = 0; slot < s.slots; slot += kPrefixTile) {
    if (slot > 0) {
      __syncthreads();
      copy_prefix(slot);
    }
    scores(slot);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float new_max = largest[half];
#pragma unroll
      for (int n = 0; n < 2; ++n) new_max = fmaxf(new_max, fmaxf(c[0][n][2 * half], c[0][n][2 * half + 1]));
      new_max = row_max(new_max);
      const float rescale = ptx::exp2_fast(largest[half] - new_max);
      total[half] *= rescale;
      weighted[half] *= rescale;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          const float weight = ptx::exp2_fast(c[0][n][e] - new_max);
          total[half] += weight;
          weighted[half] = fmaf(weight, d[0][n][e], weighted[half]);
        }
      }
      largest[half] = new_max;
    }
  }

  const int64_t statistics = statistic_row(p, s, b, head);
  float prefix_logsumexp[2], prefix_delta[2], in_warp = 0.0f;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + warp_row + lane / 4 + 8 * half;
    const float sum = row_sum(total[half]), products = row_sum(weighted[half]);
    prefix_logsumexp[half] = s.slots > 0 ? largest[half] + ptx::log2_fast(sum) : 0.0f;
    prefix_delta[half] = s.slots > 0 ? products / sum : 0.0f;
    // A row that sees one key: O's words are V of that key, and dP - D_w is zero. From the rounded O only a rounding error
    // would be left. float32 sums in the order of dP = dO V^T, every lane its whole row, so that the zero is exact.
    constexpr int kLanesOfRow = kIsHalf<T> ? 4 : 1;
    const bool sees_one = row < s.queries && visible_end(s, row) - s.key_begin == 1;
    float delta = 0.0f;
    if (row < s.queries) {
      const T* words = sees_one ? head_pointer<const T>(p.value, b, head_kv, s.first_key + s.key_begin)
                                : output_rows + row * p.output.stride_row;
      for (int column = lane % kLanesOfRow * 2; column < head_dim; column += 2 * kLanesOfRow) {
        const float2 x = load_pair(doutput_rows + row * p.doutput.stride_row + column), y = load_pair(words + column);
        delta = fmaf(x.y, y.y, fmaf(x.x, y.x, delta));
      }
    }
    if constexpr (kIsHalf<T>) delta = row_sum(delta);
    if (!sees_one) delta -= gate * prefix_delta[half];
    if (row < s.queries && lane % 4 == 0) {
      ptx::store_global(workspace.delta + statistics + row, delta);
      ptx::store_global(workspace.prefix_logsumexp + statistics + row, prefix_logsumexp[half]);
      ptx::store_global(workspace.prefix_delta + statistics + row, prefix_delta[half]);
      in_warp += prefix_delta[half];
    }
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
        c[0][n][e] = gate * ptx::exp2_fast(c[0][n][e] - prefix_logsumexp[e / 2]) * (d[0][n][e] - prefix_delta[e / 2]);
      }
    }
    multiply_pb(dquery, c, prefix_key, 0);
  }
  store_rows<kD>(workspace.dquery + statistics * head_dim, head_dim, first_row + warp_row, s.queries, dquery[0],
                 s.bad_prefix ? gate : 1.0f, 0, head_dim);
}

}  // namespace lak::sm80
