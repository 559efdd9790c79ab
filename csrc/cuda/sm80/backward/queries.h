// Backward of the words, owner of queries: dQ = scale (dS K + the prefix's part) without atomics, in a fixed order.
//
// As forward: a warp owns 16 rows, keys come in tiles, dS goes from accumulators to the A operand in registers.
// Shared memory: Q, dO [kRows, D]; per stage K, V [kKeys, D].
#pragma once

#include "sm80/backward/workspace.h"
#include "sm80/scores.h"

namespace lak::sm80 {

template <class T, int kHeadDim>
constexpr int kQueryGradientBytes = (2 * QueryGradientTiles<T, kHeadDim>::kRows +
                                     QueryGradientTiles<T, kHeadDim>::kStages * 2 * QueryGradientTiles<T, kHeadDim>::kKeys) *
                                    kHeadDim * static_cast<int>(sizeof(T));

template <class T, int kHeadDim, bool kElementwise>
__global__ void __launch_bounds__(32 * kBackwardWarps<T, kHeadDim>, (kIsTuned<T, kHeadDim> ? 2 : 1))
    backward_queries_kernel(const __grid_constant__ ZeroGateParams p, int row_blocks) {
  using Tiles = QueryGradientTiles<T, kHeadDim>;
  using KeyTile = SharedTile<T, Tiles::kKeys, kHeadDim>;
  constexpr int kN = Tiles::kKeys / 8, kD = kHeadDim / 8, kThreadsHere = 32 * kBackwardWarps<T, kHeadDim>;
  const SharedTile<T, Tiles::kRows, kHeadDim> query{ptx::dynamic_shared_memory()}, doutput{query.base + query.kBytes};
  const auto key_tile = [&](int stage) { return KeyTile{doutput.base + doutput.kBytes + stage * 2 * KeyTile::kBytes}; };
  const auto value_tile = [&](int stage) { return KeyTile{key_tile(stage).base + KeyTile::kBytes}; };

  const int block = row_blocks - 1 - static_cast<int>(blockIdx.x % row_blocks);
  const int head = static_cast<int>(blockIdx.x / row_blocks % p.heads_q);
  const int b = static_cast<int>(blockIdx.x / row_blocks / p.heads_q);
  const Sequence s = sequence_of(p, b);
  const int first_row = block * Tiles::kRows;
  if (first_row >= s.queries) return;
  const int head_kv = head / static_cast<int>(p.heads_q / p.heads_kv);
  const int thread = threadIdx.x, lane = lane_id(), head_dim = static_cast<int>(p.head_dim);
  const int warp_row = warp_id() * 16;
  const ScoreRule rule = score_rule(p, b, head);
  const float scale = kElementwise ? 1.0f : rule.scale_log2;
  const T* keys = head_pointer<const T>(p.key, b, head_kv, s.first_key);
  const T* values = head_pointer<const T>(p.value, b, head_kv, s.first_key);
  const int last_row = lower(first_row + Tiles::kRows, s.queries) - 1;
  const int begin = s.key_begin / Tiles::kKeys;
  const int end = (higher(visible_end(s, last_row), 0) + Tiles::kKeys - 1) / Tiles::kKeys;
  const auto copy = [&](int tile, int stage) {
    copy_rows<kThreadsHere>(key_tile(stage), keys, p.key.stride_row, tile * Tiles::kKeys, s.key_begin, s.key_end, head_dim,
                            thread);
    copy_rows<kThreadsHere>(value_tile(stage), values, p.value.stride_row, tile * Tiles::kKeys, s.key_begin, s.key_end,
                            head_dim, thread);
    ptx::commit_async_copies();
  };

  copy_rows<kThreadsHere>(query, head_pointer<const T>(p.query, b, head, s.first_query), p.query.stride_row, first_row, 0,
                          s.queries, head_dim, thread);
  copy_rows<kThreadsHere>(doutput, head_pointer<const T>(p.doutput, b, head, s.first_query), p.doutput.stride_row, first_row, 0,
                          s.queries, head_dim, thread);
  ptx::commit_async_copies();
  if (begin < end) copy(begin, 0);

  const BackwardWorkspace workspace = backward_workspace<T, kHeadDim>(p);
  const int64_t statistics = statistic_row(p, s, b, head);
  float dquery[1][kD][4], shift[2], rest[2], delta[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + warp_row + lane / 4 + 8 * half;
    const bool valid = row < s.queries;
    shift[half] = valid ? ptx::load_global(workspace.shift + statistics + row) : 0.0f;
    rest[half] = valid && !kIsHalf<T> ? ptx::load_global(workspace.rest + statistics + row) : 0.0f;
    delta[half] = valid ? ptx::load_global(workspace.delta + statistics + row) : 0.0f;
#pragma unroll
    for (int n = 0; n < kD; ++n) {
      const int column = 8 * n + lane % 4 * 2;
      const float2 start =
          valid && column < head_dim ? load_pair(workspace.dquery + (statistics + row) * head_dim + column) : float2{};
      dquery[0][n][2 * half] = start.x;
      dquery[0][n][2 * half + 1] = start.y;
    }
  }

  for (int tile = begin; tile < end; ++tile) {
    const int stage = (tile - begin) % Tiles::kStages;
    ptx::wait_async_copies<0>();
    __syncthreads();
    if (Tiles::kStages == 2 && tile + 1 < end) copy(tile + 1, 1 - stage);
    float c[1][kN][4], d[1][kN][4];
    set_zero(c);
    set_zero(d);
    multiply_abt(c, query, warp_row, key_tile(stage), 0);
    multiply_abt(d, doutput, warp_row, value_tile(stage), 0);
    const int first_key = tile * Tiles::kKeys;
    const bool full = first_key >= s.key_begin && first_key + Tiles::kKeys <= visible_end(s, first_row);
    if (kElementwise || !full) apply_rule<kElementwise>(c, rule, s, first_row + warp_row, first_key);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float weight = word_probability<T>(c[0][n][e], scale, shift[e / 2], rest[e / 2]);
        c[0][n][e] = weight * (d[0][n][e] - delta[e / 2]);
      }
    }
    multiply_pb(dquery, c, key_tile(stage), 0);
    if constexpr (Tiles::kStages == 1) {
      __syncthreads();
      if (tile + 1 < end) copy(tile + 1, 0);
    }
  }
  ptx::wait_async_copies<0>();
  store_rows<kD>(head_pointer<T>(p.dquery, b, head, s.first_query), p.dquery.stride_row, first_row + warp_row, s.queries,
                 dquery[0], static_cast<float>(p.scale), 0, head_dim);
}

}  // namespace lak::sm80
