// Packed tokens after the last sequence belong to none: their output and gradients are zero, their log-sum-exp is -inf. Where the
// last sequence ends only the device knows. With token tiles the kernels themselves write those rows.
#pragma once

#include "problem.h"
#include "sm80/launchers.h"
#include "sm80/softmax.h"

namespace lak::sm80 {

constexpr int kTailBlocks = 128;

// A block takes every kTailBlocks-th token of each tensor.
template <class T>
__global__ void __launch_bounds__(kThreads) zero_tail_kernel(const __grid_constant__ ZeroGateParams p, bool backward) {
  constexpr int kChunk = 16 / sizeof(T);
  const int head_chunks = static_cast<int>(p.head_dim) / kChunk;
  const auto clear = [&](const TensorView& tensor, int64_t heads, const int32_t* cu_seqlens, int64_t total) {
    if (tensor.data == nullptr) return;
    for (int64_t row = offset_at(cu_seqlens, p.batch, total) + blockIdx.x; row < total; row += kTailBlocks) {
      for (int64_t i = threadIdx.x; i < heads * head_chunks; i += kThreads) {
        T* at = head_pointer<T>(tensor, 0, i / head_chunks, row) + i % head_chunks * kChunk;
        ptx::store_global(reinterpret_cast<uint4*>(at), uint4{});
      }
    }
  };
  if (backward) {
    clear(p.dquery, p.heads_q, p.cu_seqlens_q, p.total_q);
    clear(p.dkey, p.heads_kv, p.cu_seqlens_k, p.total_k);
    clear(p.dvalue, p.heads_kv, p.cu_seqlens_k, p.total_k);
    return;
  }
  clear(p.output, p.heads_q, p.cu_seqlens_q, p.total_q);
  if (p.logsumexp.data == nullptr) return;
  for (int64_t row = offset_at(p.cu_seqlens_q, p.batch, p.total_q) + blockIdx.x; row < p.total_q; row += kTailBlocks) {
    for (int64_t head = threadIdx.x; head < p.heads_q; head += kThreads) {
      ptx::store_global(static_cast<float*>(p.logsumexp.data) + head * p.logsumexp.stride_head + row, -kInfinity);
    }
  }
}

template <class T>
int zero_tail(const ZeroGateParams& p, bool backward, cudaStream_t stream) {
  if (p.cu_seqlens_q == nullptr || is_token_tiled(p) || p.total_q + p.total_k == 0) return kLakSuccess;
  return launch<zero_tail_kernel<T>>(kTailBlocks, kThreads, stream, p, backward);
}

}  // namespace lak::sm80
