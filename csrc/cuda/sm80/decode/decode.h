// Decode: few new queries against a long cache. The keys of each sequence are
// split over blocks; the query heads of a group and the few queries fill the 16
// rows of a matrix tile together, so that K and V are read once for all of
// them.
//
// Each of a block's four warps streams its own keys, 16 at a time, through its
// own ring of shared memory: no barrier of the block in the loop, only cp.async
// and __syncwarp. The prefix is one more tile of the first warp of the first
// split. At the end the warps' partial results are merged in shared memory. Of
// a single split that is the output; else (maximum, sum, output) of each split
// and the prefix's part are written for combine.h to add.
//
// Shared memory: Q [16, D], then per warp kStages x (K [16, D], V [16, D]). The
// merge reuses all rings but the first; that ends as the prefix's part [16, D]
// in float32.
#pragma once

#include "sm80/decode/workspace.h"
#include "sm80/scores.h"
#include "sm80/softmax.h"

namespace lak::sm80 {

template <class T, int kHeadDim>
struct DecodeMemory {
  static constexpr int kStages = kDecodeStages<T, kHeadDim>, kWarpsHere = kDecodeWarps<T, kHeadDim>;
  using Tile = SharedTile<T, kDecodeRows, kHeadDim>;
  static constexpr int kRing = kStages * 2 * Tile::kBytes;
  // Merge: per warp 16 maxima, 16 sums, [16, D] float32 outputs.
  static constexpr int kMergeBytes = kWarpsHere * kDecodeRows * (2 + kHeadDim) * 4;
  static constexpr int kRingsBytes = kRing + ((kWarpsHere - 1) * kRing > kMergeBytes ? (kWarpsHere - 1) * kRing : kMergeBytes);
  static_assert(kDecodeRows * kHeadDim * 4 <= kRing, "the prefix's part takes the place of a ring");
  static constexpr int kBytes = Tile::kBytes + kRingsBytes;
};

// gate softmax(scale Q Kp^T) Vp for the 16 rows, by one warp: float32 [16, D]
// at `to`, which may be where its tiles are.
template <class T, int kHeadDim>
__device__ __forceinline__ void decode_prefix(const ZeroGateParams& params, const Sequence& s, int head_kv, int first_row,
                                              SharedTile<T, kDecodeRows, kHeadDim> query,
                                              SharedTile<T, kDecodeRows, kHeadDim> key,
                                              SharedTile<T, kDecodeRows, kHeadDim> value, uint32_t to) {
  constexpr int kD = kHeadDim / 8;
  const int lane = lane_id(), head_dim = static_cast<int>(params.head_dim),
            group = static_cast<int>(params.heads_q / params.heads_kv);
  const float scale_log2 = score_rule(params, 0, 0).scale_log2;
  using Tile = SharedTile<T, kDecodeRows, kHeadDim>;
  const auto copy = [&](const Tile& tile, const TensorView& from, int slot) {
    const T* rows = head_pointer<const T>(from, s.prefix, head_kv, 0);
    for (int index = lane; index < kDecodeRows * Tile::kChunks; index += 32) {
      const int r = index / Tile::kChunks, c = index % Tile::kChunks;
      const bool valid = slot + r < s.slots && c * Tile::kChunk < head_dim;
      ptx::copy_async_16(tile.chunk(r, c), valid ? rows + (slot + r) * from.stride_row + c * Tile::kChunk : rows, valid);
    }
  };
  float output[1][kD][4], largest[1][2] = {{-kInfinity, -kInfinity}}, total[1][2] = {};
  set_zero(output);
  for (int slot = 0; slot < s.slots; slot += kPrefixTile) {
    __syncwarp(); // every lane is done with the tiles
    copy(key, params.prefix_key, slot);
    copy(value, params.prefix_value, slot);
    ptx::commit_async_copies();
    ptx::wait_async_copies<0>();
    __syncwarp();
    float c[1][2][4];
    set_zero(c);
    multiply_abt(c, query, 0, key, 0);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        c[0][n][e] = slot + 8 * n + lane % 4 * 2 + e % 2 < s.slots ? c[0][n][e] * scale_log2 : -kInfinity;
      }
    }
    softmax_step(c, largest, total, output, 1.0f);
    multiply_pb(output, c, value, 0);
  }
  __syncwarp();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + 8 * half;
    const float factor = gate_of(params, s, head_kv * group + (first_row + row) % group) / row_sum(total[0][half]);
#pragma unroll
    for (int n = 0; n < kD; ++n) {
      ptx::store_shared(to + (row * kHeadDim + 8 * n + lane % 4 * 2) * 4,
                        float2{output[0][n][2 * half] * factor, output[0][n][2 * half + 1] * factor});
    }
  }
}

template <class T, int kHeadDim>
__global__ void __launch_bounds__(32 * kDecodeWarps<T, kHeadDim>, 1)
    decode_kernel(const __grid_constant__ ZeroGateParams params, int splits, int row_tiles) {
  using Memory = DecodeMemory<T, kHeadDim>;
  using Tile = typename Memory::Tile;
  constexpr int kD = kHeadDim / 8, kStages = Memory::kStages, kWarpsHere = Memory::kWarpsHere;
  const uint32_t base = ptx::dynamic_shared_memory();
  const int split = static_cast<int>(blockIdx.x % splits);
  const int tile = static_cast<int>(blockIdx.x / splits); // of (sequence, kv head, rows)
  const int row_tile = tile % row_tiles;
  const int head_kv = tile / row_tiles % static_cast<int>(params.heads_kv);
  const int b = tile / row_tiles / static_cast<int>(params.heads_kv);
  const int group = static_cast<int>(params.heads_q / params.heads_kv), head_dim = static_cast<int>(params.head_dim);
  const Sequence s = sequence_of(params, b);
  const int lane = lane_id(), warp = warp_id();
  const int rows = s.queries * group; // row = query * group + head in the group

  // The window is split evenly whatever the length of the cache's memory, in
  // units of what the block takes at a time.
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
    const T* source =
        head_pointer<const T>(params.query, b, head_kv * group + (valid ? row % group : 0), valid ? row / group : 0);
    ptx::copy_async_16(query.chunk(r, c), valid ? source + c * Tile::kChunk : source, valid);
  }
  ptx::commit_async_copies();

  const T* key = head_pointer<const T>(params.key, b, head_kv, s.first_key);
  const T* value = head_pointer<const T>(params.value, b, head_kv, s.first_key);
  const auto copy = [&](int stage, int at) {
    const Tile tiles[2] = {ring(stage, 0), ring(stage, 1)};
#pragma unroll
    for (int i = 0; i < kDecodeKeys * Tile::kChunks / 32; ++i) {
      const int index = i * 32 + lane, r = index / Tile::kChunks, c = index % Tile::kChunks;
      const bool valid = at + r < end_key && c * Tile::kChunk < head_dim;
      const int64_t row = valid ? at + r : 0, column = valid ? c * Tile::kChunk : 0;
      ptx::copy_async_16(tiles[0].chunk(r, c), key + row * params.key.stride_row + column, valid);
      ptx::copy_async_16(tiles[1].chunk(r, c), value + row * params.value.stride_row + column, valid);
    }
    ptx::commit_async_copies();
  };

  const int start = first_key + warp * kDecodeKeys;
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) copy(stage, start + stage * kUnit);
  ptx::wait_async_copies<kStages>();
  __syncthreads(); // Q

  const ScoreRule rule = score_rule(params, b, 0);
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
      const int end = row < rows ? row / group + s.diagonal + 1 : 0;
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
    __syncwarp(); // every lane is done with this stage
    copy(stage, at + kStages * kUnit);
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  ptx::wait_async_copies<0>();
  __syncthreads();

  // Merge the warps: float32 [warp][row] of maxima, sums and outputs.
  const uint32_t prefix = base + Tile::kBytes, maxima = prefix + Memory::kRing, sums = maxima + kWarpsHere * kDecodeRows * 4,
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
  const bool has_prefix = split == 0 && s.slots > 0;
  if (has_prefix && warp == 0) {
    decode_prefix<T, kHeadDim>(params, s, head_kv, row_tile * kDecodeRows, query, ring(0, 0), ring(0, 1), prefix);
  }
  __syncthreads();
  const DecodePartials partials(params, splits, row_tiles);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kDecodeRows;
  for (int index = threadIdx.x * 2; index < kDecodeRows * head_dim; index += 64 * kWarpsHere) {
    const int r = index / head_dim, column = index % head_dim, row = row_tile * kDecodeRows + r;
    float most = -kInfinity;
    for (int w = 0; w < kWarpsHere; ++w) most = fmaxf(most, ptx::load_shared<float>(maxima + (w * kDecodeRows + r) * 4));
    const float shift = most == -kInfinity ? 0.0f : most;
    float sum = 0.0f;
    float2 values{0.0f, 0.0f}, gated{0.0f, 0.0f};
    for (int w = 0; w < kWarpsHere; ++w) {
      const int at = w * kDecodeRows + r;
      const float weight = ptx::exp2_fast(ptx::load_shared<float>(maxima + at * 4) - shift);
      const float2 part = ptx::load_shared<float2>(outputs + (at * kHeadDim + column) * 4);
      sum = fmaf(weight, ptx::load_shared<float>(sums + at * 4), sum);
      values.x = fmaf(weight, part.x, values.x);
      values.y = fmaf(weight, part.y, values.y);
    }
    if (has_prefix) gated = ptx::load_shared<float2>(prefix + (r * kHeadDim + column) * 4);
    if (splits > 1) {
      ptx::store_global(reinterpret_cast<float2*>(partials.output + first * head_dim + index), values);
      if (has_prefix) {
        const int64_t to = static_cast<int64_t>(tile) * kDecodeRows * head_dim + index;
        ptx::store_global(reinterpret_cast<float2*>(partials.prefix + to), gated);
      }
      if (column == 0) {
        ptx::store_global(partials.largest + first + r, most);
        ptx::store_global(partials.total + first + r, sum);
      }
    } else if (row < rows) {
      const int head = head_kv * group + row % group;
      const float factor = sum > 0.0f ? 1.0f / sum : 0.0f, bad = s.bad_prefix ? gate_of(params, s, head) : 1.0f;
      store_pair(head_pointer<T>(params.output, b, head, row / group) + column, (values.x * factor + gated.x) * bad,
                 (values.y * factor + gated.y) * bad);
    }
  }
}

} // namespace lak::sm80
