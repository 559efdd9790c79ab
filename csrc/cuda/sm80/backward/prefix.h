// Backward of the prefix: dVp = gate P_p^T dO, dKp = scale gate (P_p * (dO Vp^T - D_p))^T Q, without a race: every warp sums
// a stretch of rows in registers and writes a partial sum of its own; another kernel adds them in a fixed order.
//
// A block takes 16 slots and kPrefixRowsPerBlock rows of one head; its warps take 16 rows at a time, in turn.
// Shared memory: prefix K, V [16, D]; per warp Q, dO [16, D].
#pragma once

#include "sm80/backward/workspace.h"
#include "sm80/scores.h"

namespace lak::sm80 {

template <class T, int kHeadDim>
constexpr int kPrefixKernelBytes = (2 + 2 * kBackwardWarps<T, kHeadDim>)*16 * kHeadDim * static_cast<int>(sizeof(T));

template <class T, int kHeadDim>
__global__ void __launch_bounds__(32 * kBackwardWarps<T, kHeadDim>)
    backward_prefix_kernel(const __grid_constant__ ZeroGateParams p, int slot_tiles) {
  constexpr int kWarpsHere = kBackwardWarps<T, kHeadDim>, kD = kHeadDim / 8;
  using Tile = SharedTile<T, 16, kHeadDim>;
  const BackwardWorkspace workspace = backward_workspace<T, kHeadDim>(p);
  const int warp = warp_id(), lane = lane_id(), head_dim = static_cast<int>(p.head_dim);
  const Tile prefix_key{ptx::dynamic_shared_memory()}, prefix_value{prefix_key.base + Tile::kBytes};
  const Tile query{prefix_value.base + Tile::kBytes * (1 + 2 * warp)}, doutput{query.base + Tile::kBytes};

  const int splits = workspace.parts / kWarpsHere;
  const int split = static_cast<int>(blockIdx.x % splits), slot = static_cast<int>(blockIdx.x / splits % slot_tiles) * 16;
  const int head = static_cast<int>(blockIdx.x / splits / slot_tiles % p.heads_q);
  const int b = static_cast<int>(blockIdx.x / splits / slot_tiles / p.heads_q);
  const Sequence s = sequence_of(p, b);
  if (s.slots == 0) return;  // nobody reads its partial sums
  const int head_kv = head / static_cast<int>(p.heads_q / p.heads_kv);
  copy_rows<32 * kWarpsHere>(prefix_key, head_pointer<const T>(p.prefix_key, s.prefix, head_kv, 0), p.prefix_key.stride_row,
                             slot, 0, s.slots, head_dim, threadIdx.x);
  copy_rows<32 * kWarpsHere>(prefix_value, head_pointer<const T>(p.prefix_value, s.prefix, head_kv, 0),
                             p.prefix_value.stride_row, slot, 0, s.slots, head_dim, threadIdx.x);
  ptx::commit_async_copies();
  ptx::wait_async_copies<0>();
  __syncthreads();

  const T* query_rows = head_pointer<const T>(p.query, b, head, s.first_query);
  const T* doutput_rows = head_pointer<const T>(p.doutput, b, head, s.first_query);
  const int64_t statistics = statistic_row(p, s, b, head);
  const float scale_log2 = score_rule(p, b, head).scale_log2;
  const bool elementwise = !kIsTuned<T, kHeadDim> || needs_elementwise_scores(p);
  const float before = elementwise ? scale_log2 : 1.0f, factor = elementwise ? 1.0f : scale_log2;
  float dkey[1][kD][4], dvalue[1][kD][4];
  set_zero(dkey);
  set_zero(dvalue);
  const int end = lower(s.queries, (split + 1) * kPrefixRowsPerBlock);
  for (int row = split * kPrefixRowsPerBlock + warp * 16; row < end; row += 16 * kWarpsHere) {
#pragma unroll 2
    for (int i = 0; i < 16 * Tile::kChunks / 32; ++i) {
      const int index = i * 32 + lane, r = index / Tile::kChunks, chunk = index % Tile::kChunks;
      const bool valid = row + r < s.queries && chunk * Tile::kChunk < head_dim;
      const int64_t at = valid ? row + r : 0, column = valid ? chunk * Tile::kChunk : 0;
      ptx::copy_async_16(query.chunk(r, chunk), query_rows + at * p.query.stride_row + column, valid);
      ptx::copy_async_16(doutput.chunk(r, chunk), doutput_rows + at * p.doutput.stride_row + column, valid);
    }
    ptx::commit_async_copies();
    ptx::wait_async_copies<0>();
    __syncwarp();
    float c[1][2][4], d[1][2][4];  // slots down, rows across
    set_zero(c);
    set_zero(d);
    multiply_abt(c, prefix_key, 0, query, 0);
    multiply_abt(d, prefix_value, 0, doutput, 0);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int at = row + 8 * n + lane % 4 * 2 + e % 2;
        const bool valid = at < s.queries && slot + lane / 4 + e / 2 * 8 < s.slots;
        const float shift = valid ? ptx::load_global(workspace.prefix_shift + statistics + at) : 0.0f;
        const float delta = valid ? ptx::load_global(workspace.prefix_delta + statistics + at) : 0.0f;
        c[0][n][e] = valid ? ptx::exp2_fast((c[0][n][e] * before - shift) * factor) : 0.0f;
        d[0][n][e] = c[0][n][e] * (d[0][n][e] - delta);
      }
    }
    multiply_pb(dvalue, c, doutput, 0);
    multiply_pb(dkey, d, query, 0);
    __syncwarp();
  }
  const float gate = gate_of(p, s, head);
  const int64_t size = p.prefix_length * p.head_dim;
  float* partial = workspace.dprefix +
                   ((static_cast<int64_t>(b) * p.heads_q + head) * workspace.parts + split * kWarpsHere + warp) * 2 * size;
  store_rows<kD>(partial, head_dim, slot, s.slots, dkey[0], gate * static_cast<float>(p.scale), 0, head_dim);
  store_rows<kD>(partial + size, head_dim, slot, s.slots, dvalue[0], gate, 0, head_dim);
}

}  // namespace lak::sm80
