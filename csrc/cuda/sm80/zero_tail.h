// Packed tokens after the last sequence belong to none: their output and their gradients are zero. Where the sequences end only
// the device knows.
#pragma once

#include "sm80/launchers.h"
#include "sm80/scores.h"

namespace lak::sm80 {

// Packed tensors [rows, heads, head_dim] that end at *last, the last entry of cu_seqlens.
struct Tails {
  static constexpr int kMost = 3;
  TensorView tensors[kMost];
  int64_t rows[kMost], heads[kMost];
  const int32_t* last[kMost];
  int count;

  void add(const TensorView& tensor, int64_t tokens, int64_t heads_of_it, const int32_t* end) {
    if (tensor.data == nullptr) return;
    tensors[count] = tensor;
    rows[count] = tokens;
    heads[count] = heads_of_it;
    last[count++] = end;
  }
};

constexpr int kTailThreads = 128, kTailBlocks = 64;  // blocks of each tensor; they take its rows in turn

template <class T>
__global__ void __launch_bounds__(kTailThreads) zero_tail_kernel(const __grid_constant__ Tails tails, int64_t head_dim) {
  const int tensor = static_cast<int>(blockIdx.x) / kTailBlocks;
  const int64_t pairs = tails.heads[tensor] * head_dim / 2;
  const int64_t end = clamp(ptx::load_global(tails.last[tensor]), 0, tails.rows[tensor]);
  for (int64_t row = end + blockIdx.x % kTailBlocks; row < tails.rows[tensor]; row += kTailBlocks) {
    for (int64_t pair = threadIdx.x; pair < pairs; pair += kTailThreads) {
      store_pair(head_pointer<T>(tails.tensors[tensor], 0, pair * 2 / head_dim, row) + pair * 2 % head_dim, 0.0f, 0.0f);
    }
  }
}

template <class T>
int launch_zero_tail(const Tails& tails, int64_t head_dim, cudaStream_t stream) {
  return launch<zero_tail_kernel<T>>(int64_t{tails.count} * kTailBlocks, kTailThreads, stream, tails, head_dim);
}

}  // namespace lak::sm80
