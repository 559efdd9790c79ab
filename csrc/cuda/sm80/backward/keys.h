// Backward of the words, owner of keys: dV = P^T dO, dK = scale dS^T Q, and with kAddQueryGradient dQ += dS K by atomics.
//
// A block owns kKeys keys of one kv head, each warp 16 of them, and goes over the queries of every head of the group.
// Scores are computed transposed, S^T = K Q^T and dP^T = V dO^T: then P^T and dS^T lie in registers as the A operands of
// the sums, and only dS for dQ goes through shared memory.
//
//   P = exp(S - shift)   dS = P * (dO V^T - D_w)
//
// Shared memory: K, V [kKeys, D]; per stage Q, dO [kRows, D], shift, D_w [kRows]; dS^T [kKeys, kRows].
#pragma once

#include "sm80/backward/workspace.h"
#include "sm80/scores.h"

namespace lak::sm80 {

template <class T, int kHeadDim, bool kAddQueryGradient>
struct KeyGradientMemory {
  using Tiles = KeyGradientTiles<T, kHeadDim>;
  using KeyTile = SharedTile<T, Tiles::kKeys, kHeadDim>;
  using RowTile = SharedTile<T, Tiles::kRows, kHeadDim>;
  static constexpr int kStatistics = kIsHalf<T> ? 2 : 3;  // shift, D_w, rest
  static constexpr int kStage = 2 * RowTile::kBytes + kStatistics * Tiles::kRows * 4;
  static constexpr int kScoreBytes = kAddQueryGradient ? Tiles::kKeys * Tiles::kRows * 2 : 0;
  static constexpr int kBytes = 2 * KeyTile::kBytes + kScoreBytes + Tiles::kStages * kStage;
};

template <class T, int kHeadDim, bool kElementwise, bool kAddQueryGradient>
__global__ void __launch_bounds__(32 * kBackwardWarps<T, kHeadDim>, (kIsTuned<T, kHeadDim> ? 2 : 1))
    backward_keys_kernel(const __grid_constant__ ZeroGateParams p, int key_blocks) {
  using Memory = KeyGradientMemory<T, kHeadDim, kAddQueryGradient>;
  using Tiles = typename Memory::Tiles;
  using RowTile = typename Memory::RowTile;
  constexpr int kRows = Tiles::kRows, kN = kRows / 8, kD = kHeadDim / 8, kStages = Tiles::kStages;
  constexpr int kThreadsHere = 32 * kBackwardWarps<T, kHeadDim>;
  const uint32_t base = ptx::dynamic_shared_memory();
  const typename Memory::KeyTile key{base}, value{base + key.kBytes};
  const uint32_t scores_base = value.base + value.kBytes, stages_base = scores_base + Memory::kScoreBytes;
  const auto query_tile = [&](int stage) { return RowTile{stages_base + stage * Memory::kStage}; };
  const auto doutput_tile = [&](int stage) { return RowTile{stages_base + stage * Memory::kStage + RowTile::kBytes}; };
  const auto statistics_at = [&](int stage) { return stages_base + stage * Memory::kStage + 2 * RowTile::kBytes; };

  const int block = static_cast<int>(blockIdx.x % key_blocks);  // the first keys are seen by the most queries
  const int head_kv = static_cast<int>(blockIdx.x / key_blocks % p.heads_kv);
  const int b = static_cast<int>(blockIdx.x / key_blocks / p.heads_kv);
  const Sequence s = sequence_of(p, b);
  const int first_key = block * Tiles::kKeys;
  if (first_key >= s.keys) return;
  const BackwardWorkspace workspace = backward_workspace<T, kHeadDim>(p);
  const int group = static_cast<int>(p.heads_q / p.heads_kv), head_dim = static_cast<int>(p.head_dim);
  const int thread = threadIdx.x, lane = lane_id(), warp = warp_id();

  copy_rows<kThreadsHere>(key, head_pointer<const T>(p.key, b, head_kv, s.first_key), p.key.stride_row, first_key, s.key_begin,
                          s.key_end, head_dim, thread);
  copy_rows<kThreadsHere>(value, head_pointer<const T>(p.value, b, head_kv, s.first_key), p.value.stride_row, first_key,
                          s.key_begin, s.key_end, head_dim, thread);
  ptx::commit_async_copies();  // by themselves: a block that no query sees has no other group to wait for

  // Queries [begin, end) in blocks of kRows see some of these keys; one step is a block of one head.
  const bool any = first_key < s.key_end && first_key + Tiles::kKeys > s.key_begin;
  const int begin = higher(first_key - s.diagonal, 0) / kRows;
  const int per_head = any ? higher((s.queries + kRows - 1) / kRows - begin, 0) : 0;
  const int steps = per_head * group;
  const auto head_of = [&](int step) { return head_kv * group + step / per_head; };
  const auto row_of = [&](int step) { return (begin + step % per_head) * kRows; };
  const auto copy = [&](int step, int stage) {
    const int head = head_of(step), row = row_of(step);
    copy_rows<kThreadsHere>(query_tile(stage), head_pointer<const T>(p.query, b, head, s.first_query), p.query.stride_row, row,
                            0, s.queries, head_dim, thread);
    copy_rows<kThreadsHere>(doutput_tile(stage), head_pointer<const T>(p.doutput, b, head, s.first_query), p.doutput.stride_row,
                            row, 0, s.queries, head_dim, thread);
    if (thread < kRows) {
      const bool valid = row + thread < s.queries;
      const int64_t at = statistic_row(p, s, b, head) + (valid ? row + thread : 0);
      ptx::copy_async_4(statistics_at(stage) + thread * 4, workspace.shift + at, valid);
      ptx::copy_async_4(statistics_at(stage) + (kRows + thread) * 4, workspace.delta + at, valid);
      if (!kIsHalf<T>) ptx::copy_async_4(statistics_at(stage) + (2 * kRows + thread) * 4, workspace.rest + at, valid);
    }
    ptx::commit_async_copies();
  };

  float dkey[1][kD][4], dvalue[1][kD][4];
  set_zero(dkey);
  set_zero(dvalue);
  if (steps > 0) copy(0, 0);
  for (int step = 0; step < steps; ++step) {
    const int stage = step % kStages, head = head_of(step), row = row_of(step);
    ptx::wait_async_copies<0>();
    __syncthreads();  // this step's tiles are there; every warp is done with the step before
    if (kStages == 2 && step + 1 < steps) copy(step + 1, 1 - stage);
    const ScoreRule rule = score_rule(p, b, head);
    const float scale = kElementwise ? 1.0f : rule.scale_log2;

    float c[1][kN][4], d[1][kN][4];
    set_zero(c);
    multiply_abt(c, key, warp * 16, query_tile(stage), 0);
    const bool full = first_key >= s.key_begin && first_key + Tiles::kKeys <= visible_end(s, row) && row + kRows <= s.queries;
    if (kElementwise || !full) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          c[0][n][e] = score<kElementwise>(c[0][n][e], rule, s, row + 8 * n + lane % 4 * 2 + e % 2,
                                           first_key + warp * 16 + lane / 4 + e / 2 * 8);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const uint32_t at = statistics_at(stage) + (8 * n + lane % 4 * 2) * 4;
      const float2 shift = ptx::load_shared<float2>(at);
      const float2 rest = kIsHalf<T> ? float2{} : ptx::load_shared<float2>(at + 2 * kRows * 4);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        c[0][n][e] = word_probability<T>(c[0][n][e], scale, e % 2 == 0 ? shift.x : shift.y, e % 2 == 0 ? rest.x : rest.y);
      }
    }
    multiply_pb(dvalue, c, doutput_tile(stage), 0);
    set_zero(d);
    multiply_abt(d, value, warp * 16, doutput_tile(stage), 0);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const float2 delta = ptx::load_shared<float2>(statistics_at(stage) + (kRows + 8 * n + lane % 4 * 2) * 4);
#pragma unroll
      for (int e = 0; e < 4; ++e) c[0][n][e] *= d[0][n][e] - (e % 2 == 0 ? delta.x : delta.y);
    }
    multiply_pb(dkey, c, query_tile(stage), 0);

    if constexpr (kAddQueryGradient) {
      const SharedTile<T, Tiles::kKeys, kRows> dscores{scores_base};
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          ptx::store_shared(dscores.element(warp * 16 + lane / 4 + 8 * half, 8 * n + lane % 4 * 2),
                            ptx::pack<T>(c[0][n][2 * half], c[0][n][2 * half + 1]));
        }
      }
      __syncthreads();
      // dQ [kRows, D]: a warp takes 16 rows and its share of the columns.
      constexpr int kRowTiles = kRows / 16, kColumns = kHeadDim * kRowTiles / kWarps;
      const int part_row = warp % kRowTiles * 16, part_column = warp / kRowTiles * kColumns;
      float dquery[1][kColumns / 8][4];
      set_zero(dquery);
#pragma unroll
      for (int k = 0; k < Tiles::kKeys; k += 16) {
        FragmentA<T> a;
        load_a_transposed(a, dscores, k, part_row);
#pragma unroll
        for (int n = 0; n < kColumns / 8; n += 2) {
          FragmentB<T> fragment;
          load_b_transposed(fragment, key, k, part_column + 8 * n);
          multiply_add(dquery[0][n], dquery[0][n + 1], a, fragment);
        }
      }
      float* sums = workspace.dquery + statistic_row(p, s, b, head) * head_dim;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = row + part_row + lane / 4 + 8 * half;
        if (r >= s.queries) continue;
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n) {
          const int column = part_column + 8 * n + lane % 4 * 2;
          if (column >= head_dim) continue;
          float* at = sums + static_cast<int64_t>(r) * head_dim + column;
          ptx::add_global(at, dquery[0][n][2 * half]);
          ptx::add_global(at + 1, dquery[0][n][2 * half + 1]);
        }
      }
    }
    if constexpr (kStages == 1) {
      __syncthreads();
      if (step + 1 < steps) copy(step + 1, 0);
    }
  }
  ptx::wait_async_copies<0>();  // K and V of a block that no query sees

  const int row = first_key + warp * 16;
  store_rows<kD>(head_pointer<T>(p.dkey, b, head_kv, s.first_key), p.dkey.stride_row, row, s.keys, dkey[0],
                 static_cast<float>(p.scale), 0, head_dim);
  store_rows<kD>(head_pointer<T>(p.dvalue, b, head_kv, s.first_key), p.dvalue.stride_row, row, s.keys, dvalue[0], 1.0f, 0,
                 head_dim);
}

}  // namespace lak::sm80
