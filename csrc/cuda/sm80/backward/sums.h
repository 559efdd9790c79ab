// Backward, last kernels: partial sums become gradients, in a fixed order; float32 becomes the element type.
#pragma once

#include "sm80/backward/workspace.h"
#include "sm80/scores.h"

namespace lak::sm80 {

constexpr int kSumThreads = 128;

// dKp, dVp: a thread an element of [A, Hkv, P, D], over the sequences that use entry a, the heads of the group, the parts.
template <class T, int kHeadDim>
__global__ void __launch_bounds__(kSumThreads) sum_prefix_kernel(const __grid_constant__ ZeroGateParams p) {
  const BackwardWorkspace workspace = backward_workspace<T, kHeadDim>(p);
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  const int64_t size = p.prefix_length * p.head_dim, group = p.heads_q / p.heads_kv;
  if (index >= p.prefix_count * p.heads_kv * size) return;
  const int64_t element = index % size, head_kv = index / size % p.heads_kv, entry = index / size / p.heads_kv;
  float dkey = 0.0f, dvalue = 0.0f;
  for (int b = 0; b < p.batch; ++b) {
    const Sequence s = sequence_of(p, b);
    if (s.slots == 0 || s.prefix != entry) continue;
    const float* parts = workspace.dprefix + (b * p.heads_q + head_kv * group) * workspace.parts * 2 * size + element;
    for (int64_t part = 0; part < group * workspace.parts; ++part) {
      dkey += ptx::load_global(parts + part * 2 * size);
      dvalue += ptx::load_global(parts + part * 2 * size + size);
    }
  }
  const int64_t slot = element / p.head_dim, column = element % p.head_dim;
  ptx::store_global(head_pointer<T>(p.dprefix_key, entry, head_kv, slot) + column, ptx::narrow<T>(dkey));
  ptx::store_global(head_pointer<T>(p.dprefix_value, entry, head_kv, slot) + column, ptx::narrow<T>(dvalue));
}

// dgate: a warp an element of [A, Hq].
template <class T, int kHeadDim>
__global__ void __launch_bounds__(32) sum_gate_kernel(const __grid_constant__ ZeroGateParams p) {
  const BackwardWorkspace workspace = backward_workspace<T, kHeadDim>(p);
  const int64_t head = blockIdx.x % p.heads_q, entry = blockIdx.x / p.heads_q;
  float sum = 0.0f;
  for (int b = 0; b < p.batch; ++b) {
    const Sequence s = sequence_of(p, b);
    if (s.slots == 0 || s.prefix != entry) continue;
    for (int block = lane_id(); block < workspace.row_blocks; block += 32) {
      sum += ptx::load_global(workspace.dgate + (b * p.heads_q + head) * workspace.row_blocks + block);
    }
  }
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kAllLanes, sum, lanes);
  if (lane_id() == 0) ptx::store_global(static_cast<float*>(p.dgate) + blockIdx.x, sum);
}

// dQ = scale x sums: a thread two columns of a row of [B, Hq, total_q] (packed: [Hq, total_q]).
template <class T, int kHeadDim>
__global__ void __launch_bounds__(kSumThreads) convert_dquery_kernel(const __grid_constant__ ZeroGateParams p) {
  const BackwardWorkspace workspace = backward_workspace<T, kHeadDim>(p);
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x, pairs = p.head_dim / 2;
  const int64_t column = index % pairs * 2, line = index / pairs, row = line % p.total_q;
  const int64_t head = line / p.total_q % p.heads_q, b = line / p.total_q / p.heads_q;
  if (b >= (p.cu_seqlens_q != nullptr ? 1 : p.batch)) return;
  const float2 sum = load_pair(workspace.dquery + line * p.head_dim + column);
  const float scale = static_cast<float>(p.scale);
  store_pair(head_pointer<T>(p.dquery, b, head, row) + column, sum.x * scale, sum.y * scale);
}

}  // namespace lak::sm80
