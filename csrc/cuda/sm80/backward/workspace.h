// Where backward keeps what its kernels hand to one another, all float32. R = batch x heads_q x seq_q rows (packed:
// heads_q x total_q), in the order of statistic_row().
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "sm80/tiles.h"
#include "zero_gate_params.h"

namespace lak::sm80 {

constexpr int kPrefixRowsPerBlock = 512;  // queries whose prefix gradients one block sums

struct BackwardWorkspace {
  float* delta;         // [R] D_w
  float* shift;         // [R] log-sum-exp of the words in units of the scores, see word_probability()
  float* rest;          // [R] what the shift loses, float32 only
  float* prefix_shift;  // [R] the same of the prefix
  float* prefix_delta;  // [R] D_p
  float* dquery;        // [R, head_dim] sums, before the factor `scale`; begins as the prefix's part
  float* dgate;         // [batch, heads_q, row_blocks]
  float* dprefix;       // [batch, heads_q, parts, 2 (K, V), P, head_dim]
  int row_blocks, parts;
  int64_t bytes;

  // With a null base the pointers mean nothing, but `bytes` does.
  __host__ __device__ BackwardWorkspace(const ZeroGateParams& p, int rows_per_block, int warps) {
    float* next = static_cast<float*>(p.workspace);
    int64_t used = 0;
    const auto take = [&](int64_t count) {
      float* piece = next + used;
      used += (count + 3) / 4 * 4;  // 16-byte aligned
      return piece;
    };
    const int64_t rows = (p.cu_seqlens_q != nullptr ? 1 : p.batch) * p.heads_q * p.total_q;
    const bool prefix = p.dgate != nullptr;
    row_blocks = static_cast<int>((p.seq_q + rows_per_block - 1) / rows_per_block);
    parts = static_cast<int>((p.seq_q + kPrefixRowsPerBlock - 1) / kPrefixRowsPerBlock) * warps;
    delta = take(rows);
    shift = take(rows);
    rest = take(p.dtype == DataType::kFloat32 ? rows : 0);
    prefix_shift = take(rows);
    prefix_delta = take(rows);
    dquery = take(p.dquery.data != nullptr ? rows * p.head_dim : 0);
    dgate = take(prefix ? p.batch * p.heads_q * row_blocks : 0);
    dprefix = take(prefix ? p.batch * p.heads_q * parts * 2 * p.prefix_length * p.head_dim : 0);
    bytes = used * 4;
  }
};

template <class T, int kHeadDim>
__host__ __device__ BackwardWorkspace backward_workspace(const ZeroGateParams& p) {
  constexpr int kWarpsHere = kBackwardWarps<T, kHeadDim>;
  return BackwardWorkspace(p, kWarpsHere * 16, kWarpsHere);
}

}  // namespace lak::sm80
