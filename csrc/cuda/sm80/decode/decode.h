// Decode: few new queries against a long cache. The keys of each sequence are split over blocks; the query heads of a group
// and the few queries fill the 16 rows of a matrix tile together, so that K and V are read once for all of them.
//
// Each of a block's four warps streams its own keys, 16 at a time, through its own ring of shared memory: no barrier of the
// block in the loop, only cp.async and __syncwarp. At the end the warps' partial results are merged in shared memory and
// written as (maximum, sum, output) of the split; combine.h adds the splits and the prefix.
//
// Shared memory: Q [16, D], then per warp kStages x (K [16, D], V [16, D]). The merge reuses the rings.
#pragma once

#include "sm80/decode/workspace.h"
#include "sm80/scores.h"

namespace lak::sm80 {

template <class T, int kHeadDim>
struct DecodeMemory {
  static constexpr int kStages = kDecodeStages<T, kHeadDim>, kWarpsHere = kDecodeWarps<T, kHeadDim>;
  using Tile = SharedTile<T, kDecodeRows, kHeadDim>;
  static constexpr int kRing = kStages * 2 * Tile::kBytes;
  // Merge: per warp 16 maxima, 16 sums, [16, D] float32 outputs.
  static constexpr int kMergeBytes = kWarpsHere * kDecodeRows * (2 + kHeadDim) * 4;
  static constexpr int kRingsBytes = kWarpsHere * kRing > kMergeBytes ? kWarpsHere * kRing : kMergeBytes;
  static constexpr int kBytes = Tile::kBytes + kRingsBytes;
};

template <class T, int kHeadDim>
__global__ void __launch_bounds__(32 * kDecodeWarps<T, kHeadDim>, 1)
    decode_kernel(const __grid_constant__ ZeroGateParams p, int splits, int row_tiles) {
  using Memory = DecodeMemory<T, kHeadDim>;
  using Tile = typename Memory::Tile;
  constexpr int kD = kHeadDim / 8, kStages = Memory::kStages, kWarpsHere = Memory::kWarpsHere;
  const uint32_t base = ptx::dynamic_shared_memory();
  const int split = static_cast<int>(blockIdx.x % splits);
  const int tile = static_cast<int>(blockIdx.x / splits);  // of (sequence, kv head, rows)
  const int row_tile = tile % row_tiles;
  const int head_kv = tile / row_tiles % static_cast<int>(p.heads_kv);
  const int b = tile / row_tiles / static_cast<int>(p.heads_kv);
  const int group = static_cast<int>(p.heads_q / p.heads_kv), head_dim = static_cast<int>(p.head_dim);
  const Sequence s = sequence_of(p, b);
  const int lane = lane_id(), warp = warp_id();
  const int rows = s.queries * group;  // row = query * group + head in the group

  // The window is split evenly whatever the length of the cache's memory, in units of what the block takes at a time.
  constexpr int kUnit = kWarpsHere * kDecodeKeys;
  const int units = (higher(s.key_end - s.key_begin, 0) + kUnit - 1) / kUnit;
  const int per_split = (units + splits - 1) / splits;
  const int first_key = s.key_begin + lower(split * per_split, units) * kUnit;
  const int end_key = lower(s.key_end, s.key_begin + lower((split + 1) * per_split, units) * kUnit);

  const Tile query{base};
  const auto ring = [&](int stage, int which) {
    return Tile{base + Tile::kBytes + warp * Memory::kRing + (stage * 2 + which) * Tile::kBytes};
  };
  for (int index = threadIdx.x; index < kDecodeRows * Tile::kChunks; index += 32 * kWarpsHere) {
    const int r = index / Tile::kChunks, c = index % Tile::kChunks, row = row_tile * kDecodeRows + r;
    const bool valid = row < rows && c * Tile::kChunk < head_dim;
    const T* source = head_pointer<const T>(p.query, b, head_kv * group + (valid ? row % group : 0), valid ? row / group : 0);
    ptx::copy_async_16(query.chunk(r, c), valid ? source + c * Tile::kChunk : source, valid);
  }
  ptx::commit_async_copies();

  const T* key = head_pointer<const T>(p.key, b, head_kv, s.first_key);
  const T* value = head_pointer<const T>(p.value, b, head_kv, s.first_key);
  const auto copy = [&](int stage, int at) {
    const Tile tiles[2] = {ring(stage, 0), ring(stage, 1)};
#pragma unroll
    for (int i = 0; i < kDecodeKeys * Tile::kChunks / 32; ++i) {
      const int index = i * 32 + lane, r = index / Tile::kChunks, c = index % Tile::kChunks;
      const bool valid = at + r < end_key && c * Tile::kChunk < head_dim;
      const int64_t row = valid ? at + r : 0, column = valid ? c * Tile::kChunk : 0;
      ptx::copy_async_16(tiles[0].chunk(r, c), key + row * p.key.stride_row + column, valid);
      ptx::copy_async_16(tiles[1].chunk(r, c), value + row * p.value.stride_row + column, valid);
    }
    ptx::commit_async_copies();
  };

  const int start = first_key + warp * kDecodeKeys;
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) copy(stage, start + stage * kUnit);
  ptx::wait_async_copies<kStages>();
  __syncthreads();  // Q

  const ScoreRule rule = score_rule(p, b, 0);
  float output[1][kD][4], largest[2] = {-kInfinity, -kInfinity}, total[2] = {0.0f, 0.0f};
  set_zero(output);
  int stage = 0;
  for (int at = start; at < end_key; at += kUnit) {
    ptx::wait_async_copies<kStages - 1>();
    __syncwarp();
    float c[1][2][4];
    set_zero(c);
    multiply_abt(c, query, 0, ring(stage, 0), 0);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row_tile * kDecodeRows + lane / 4 + 8 * half;
      const int end = row < rows ? visible_end(s, row / group) : 0;
      float tile_max = largest[half];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          const int k = at + 8 * n + lane % 4 * 2 + e % 2;
          c[0][n][e] = k >= s.key_begin && k < lower(end, end_key) ? c[0][n][e] * rule.scale_log2 : -kInfinity;
          tile_max = fmaxf(tile_max, c[0][n][e]);
        }
      }
      tile_max = row_max(tile_max);
      const float shift = tile_max == -kInfinity ? 0.0f : tile_max;
      const float rescale = ptx::exp2_fast(largest[half] - shift);
      largest[half] = tile_max;
      total[half] *= rescale;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          c[0][n][e] = ptx::exp2_fast(c[0][n][e] - shift);
          total[half] += c[0][n][e];
        }
      }
#pragma unroll
      for (int n = 0; n < kD; ++n) {
        output[0][n][2 * half] *= rescale;
        output[0][n][2 * half + 1] *= rescale;
      }
    }
    multiply_pb(output, c, ring(stage, 1), 0);
    __syncwarp();  // every lane is done with this stage
    copy(stage, at + kStages * kUnit);
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  ptx::wait_async_copies<0>();
  __syncthreads();

  // Merge the warps: float32 [warp][row] of maxima, sums and outputs.
  const uint32_t maxima = base + Tile::kBytes, sums = maxima + kWarpsHere * kDecodeRows * 4,
                 outputs = sums + kWarpsHere * kDecodeRows * 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int at = warp * kDecodeRows + lane / 4 + 8 * half;
    const float sum = row_sum(total[half]);
    if (lane % 4 == 0) {
      ptx::store_shared(maxima + at * 4, largest[half]);
      ptx::store_shared(sums + at * 4, sum);
    }
#pragma unroll
    for (int n = 0; n < kD; ++n) {
      ptx::store_shared(outputs + (at * kHeadDim + 8 * n + lane % 4 * 2) * 4,
                        float2{output[0][n][2 * half], output[0][n][2 * half + 1]});
    }
  }
  __syncthreads();
  const DecodePartials partials(p, splits, row_tiles);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kDecodeRows;
  for (int index = threadIdx.x; index < kDecodeRows * head_dim; index += 32 * kWarpsHere) {
    const int row = index / head_dim, column = index % head_dim;
    float most = -kInfinity;
    for (int w = 0; w < kWarpsHere; ++w) most = fmaxf(most, ptx::load_shared<float>(maxima + (w * kDecodeRows + row) * 4));
    const float shift = most == -kInfinity ? 0.0f : most;
    float sum = 0.0f, value_sum = 0.0f;
    for (int w = 0; w < kWarpsHere; ++w) {
      const int at = w * kDecodeRows + row;
      const float weight = ptx::exp2_fast(ptx::load_shared<float>(maxima + at * 4) - shift);
      sum = fmaf(weight, ptx::load_shared<float>(sums + at * 4), sum);
      value_sum = fmaf(weight, ptx::load_shared<float>(outputs + (at * kHeadDim + column) * 4), value_sum);
    }
    ptx::store_global(partials.output + first * head_dim + index, value_sum);
    if (column == 0) {
      ptx::store_global(partials.largest + first + row, most);
      ptx::store_global(partials.total + first + row, sum);
    }
  }
}

}  // namespace lak::sm80
