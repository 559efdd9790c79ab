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
__global__ void __launch_bounds__(kThreads) zero_tail_kernel(const __grid_constant__ ZeroGateParams params, bool backward) {
  constexpr int kChunk = 16 / sizeof(T);
  const int head_chunks = static_cast<int>(params.head_dim) / kChunk;
  const auto clear = [&](const TensorView& tensor, int64_t heads, const int32_t* cu_seqlens, int64_t total) {
    if (tensor.data == nullptr) return;
    for (int64_t row = offset_at(cu_seqlens, params.batch, total) + blockIdx.x; row < total; row += kTailBlocks) {
      for (int64_t i = threadIdx.x; i < heads * head_chunks; i += kThreads) {
        T* at = head_pointer<T>(tensor, 0, i / head_chunks, row) + i % head_chunks * kChunk;
        ptx::store_global(reinterpret_cast<uint4*>(at), uint4{});
      }
    }
  };
  if (backward) {
    clear(params.dquery, params.heads_q, params.cu_seqlens_q, params.total_q);
    clear(params.dkey, params.heads_kv, params.cu_seqlens_k, params.total_k);
    clear(params.dvalue, params.heads_kv, params.cu_seqlens_k, params.total_k);
    return;
  }
  clear(params.output, params.heads_q, params.cu_seqlens_q, params.total_q);
  if (params.logsumexp.data == nullptr) return;
  for (int64_t row = offset_at(params.cu_seqlens_q, params.batch, params.total_q) + blockIdx.x; row < params.total_q;
       row += kTailBlocks) {
    for (int64_t head = threadIdx.x; head < params.heads_q; head += kThreads) {
      ptx::store_global(static_cast<float*>(params.logsumexp.data) + head * params.logsumexp.stride_head + row, -kInfinity);
    }
  }
}

template <class T>
int zero_tail(const ZeroGateParams& params, bool backward, cudaStream_t stream) {
  if (params.cu_seqlens_q == nullptr || is_token_tiled(params) || params.total_q + params.total_k == 0) return kLakSuccess;
  return launch<zero_tail_kernel<T>>(kTailBlocks, kThreads, stream, params, backward);
}

}  // namespace lak::sm80
