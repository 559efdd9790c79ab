// How decode splits the keys of the cache, and where the splits' partial
// results lie.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "zero_gate_params.h"

namespace lak::sm80 {

constexpr int kDecodeRows = 16, kDecodeKeys = 16;

// The grid of decode: rows of the group's heads and the new queries together,
// in tiles of 16, times splits of the keys.
struct DecodeSplits {
  int64_t row_tiles, splits;

  // As many splits as fill the current device about twice, none of them shorter
  // than 256 keys of the cache's memory.
  explicit DecodeSplits(const ZeroGateParams& params)
      : row_tiles(ceil(params.seq_q * (params.heads_q / params.heads_kv), kDecodeRows)), splits(1) {
    int device = 0, multiprocessors = 0;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
      multiprocessors = 1;
    }
    const int64_t tiles = params.batch * params.heads_kv * row_tiles;
    const int64_t wanted = ceil(2 * multiprocessors, tiles > 0 ? tiles : 1), most = ceil(params.seq_k, 256);
    if (wanted > 1 && most > 1) splits = wanted < most ? wanted : most;
  }

  int64_t blocks(const ZeroGateParams& params) const { return params.batch * params.heads_kv * row_tiles * splits; }

 private:
  static int64_t ceil(int64_t a, int64_t b) { return (a + b - 1) / b; }
};

// In the workspace, float32: output [tiles, splits, 16, D], the prefix's part
// [tiles, 16, D], then maximum and sum [tiles, splits, 16] each; a tile is
// (sequence, kv head, 16 rows of queries and heads).
struct DecodePartials {
  float *output, *prefix, *largest, *total;
  int64_t bytes;

  // With a null base the pointers mean nothing, but `bytes` does.
  __host__ __device__ DecodePartials(const ZeroGateParams& params, int64_t splits, int64_t row_tiles) {
    const int64_t rows = params.batch * params.heads_kv * row_tiles * splits * kDecodeRows;
    output = static_cast<float*>(params.workspace);
    prefix = output + rows * params.head_dim;
    largest = prefix + rows / splits * params.head_dim;
    total = largest + rows;
    bytes = (rows * (params.head_dim + 2) + rows / splits * params.head_dim) * static_cast<int64_t>(sizeof(float));
  }
};

} // namespace lak::sm80
