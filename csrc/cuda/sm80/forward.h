// Forward: softmax(scale Q K^T) V + gate softmax(scale Q Kp^T) Vp in one pass over the keys (FlashAttention-2).
//
// A block owns kRows queries of one head; each of its four warps 16 kRowTiles of them, alone: rows never meet in shared
// memory. Keys come in tiles of kKeys; scores, probabilities and the output stay in registers. The copy of V runs under
// Q K^T, that of the next K under softmax and P V. After the last tile the output is normalised, and the prefix is added to
// it as one more tile whose probabilities are complete (they sum to the gate): no second accumulator, no rescaling.
//
// Every row has a window of keys that it sees. A warp skips the tiles that none of its rows see, and looks score by score only
// at those that some row does not see whole.
//
// Where the tokens of several sequences share a tile and a row is not finite, the tile is computed again (Part, in problem.h).
//
// Shared memory: Q [kRows, D], K [kKeys, D], V [kKeys, D], prefix K [16, D], prefix V [16, D], windows [kRows], the part of this
// pass (ForwardMemory).
#pragma once

#include "sm80/scores.h"
#include "sm80/softmax.h"

namespace lak::sm80 {

template <class T, int kHeadDim, ForwardKind kKind>
struct ForwardMemory {
  using Tiles = ForwardTiles<T, kHeadDim, kKind>;
  SharedTile<T, Tiles::kRows, kHeadDim> query;
  SharedTile<T, Tiles::kKeys, kHeadDim> key, value;
  SharedTile<T, kPrefixTile, kHeadDim> prefix_key, prefix_value;
  uint32_t windows;
  SharedPart part;
  static constexpr bool kPrefixApart = Tiles::kPrefixApart;
  static_assert(kPrefixApart || Tiles::kKeys >= kPrefixTile);
  static constexpr int kBytes =
      (Tiles::kRows + 2 * Tiles::kKeys + (kPrefixApart ? 2 * kPrefixTile : 0)) * kHeadDim * static_cast<int>(sizeof(T)) +
      Tiles::kRows * static_cast<int>(sizeof(Window)) + SharedPart::kBytes;

  __device__ __forceinline__ explicit ForwardMemory(uint32_t base) {
    query.base = base;
    key.base = query.base + query.kBytes;
    value.base = key.base + key.kBytes;
    prefix_key.base = kPrefixApart ? value.base + value.kBytes : key.base;
    prefix_value.base = kPrefixApart ? prefix_key.base + prefix_key.kBytes : value.base;
    windows = (kPrefixApart ? prefix_value.base + prefix_value.kBytes : value.base + value.kBytes);
    part.base = windows + Tiles::kRows * static_cast<int>(sizeof(Window));
  }
  __device__ __forceinline__ uint32_t window_at(int row) const { return windows + row * static_cast<int>(sizeof(Window)); }
};

// Scores of 16 prefix slots times `factor`; -inf where there is no slot.
template <int kM, class T, int R, int C>
__device__ __forceinline__ void prefix_scores(float (&c)[kM][2][4], SharedTile<T, R, C> query, int row,
                                              SharedTile<T, kPrefixTile, C> prefix_key, int slots_left, float factor) {
  set_zero(c);
  multiply_abt(c, query, row, prefix_key, 0);
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        c[m][n][e] = 8 * n + lane_id() % 4 * 2 + e % 2 < slots_left ? c[m][n][e] * factor : -kInfinity;
      }
    }
  }
}

// Which rows a block computes.
struct ForwardPlace {
  int b, head, head_kv, first_row;
  Sequence s;
};

template <int kRows>
__device__ __forceinline__ ForwardPlace place_of(const ZeroGateParams& params, unsigned index, int row_blocks) {
  ForwardPlace place;
  // Causal rows cost more the later they are: those go first.
  place.first_row = (row_blocks - 1 - static_cast<int>(index % row_blocks)) * kRows;
  place.head = static_cast<int>(index / row_blocks % params.heads_q);
  place.b = static_cast<int>(index / row_blocks / params.heads_q);
  place.head_kv = place.head / static_cast<int>(params.heads_q / params.heads_kv);
  place.s = sequence_of(params, place.b);
  return place;
}

template <class T, class Memory>
__device__ __forceinline__ void copy_prefix(const Memory& memory, const ZeroGateParams& params, const ForwardPlace& place,
                                            int slot) {
  const int slots = place.s.slots, head_dim = static_cast<int>(params.head_dim), thread = ptx::thread_index();
  copy_rows<kThreads>(memory.prefix_key, head_pointer<const T>(params.prefix_key, place.s.prefix, place.head_kv, 0),
                      params.prefix_key.stride_row, slot, 0, slots, head_dim, thread);
  copy_rows<kThreads>(memory.prefix_value, head_pointer<const T>(params.prefix_value, place.s.prefix, place.head_kv, 0),
                      params.prefix_value.stride_row, slot, 0, slots, head_dim, thread);
}

// Tokens after the last sequence: zeros, and a log-sum-exp of -inf.
template <class T, int kRows>
__device__ __forceinline__ void write_empty_rows(const ZeroGateParams& params, const ForwardPlace& place) {
  const auto& [b, head, head_kv, first_row, s] = place;
  const int64_t statistics = statistic_row(params, s, b, head);
  constexpr int kChunk = 16 / sizeof(T);
  T* output = head_pointer<T>(params.output, b, head, s.first_query);
  const int chunks = static_cast<int>(params.head_dim) / kChunk;
  for (int i = threadIdx.x; i < kRows * chunks; i += kThreads) {
    const int row = first_row + i / chunks;
    if (row >= s.rows) break;
    ptx::store_global(reinterpret_cast<uint4*>(output + row * params.output.stride_row + i % chunks * kChunk), uint4{});
  }
  if (params.logsumexp.data == nullptr) return;
  for (int row = first_row + static_cast<int>(threadIdx.x); row < lower(first_row + kRows, s.rows); row += kThreads) {
    ptx::store_global(static_cast<float*>(params.logsumexp.data) + statistics + row, -kInfinity);
  }
}

// After the last key: normalises the word branch, leaves its statistics, adds the prefix and stores the rows of the part.
// `place` is found anew by the caller, so that nothing of it takes registers in the loop over the keys.
template <class T, int kHeadDim, ForwardKind kKind, int kM, int kD>
__device__ __forceinline__ void finish_forward(const ZeroGateParams& params, const ForwardPlace& place,
                                               const ForwardMemory<T, kHeadDim, kKind>& memory, const Part& part,
                                               float (&output)[kM][kD][4], const float (&largest)[kM][2],
                                               const float (&total)[kM][2]) {
  using Memory = ForwardMemory<T, kHeadDim, kKind>;
  constexpr bool kElementwise = kKind == ForwardKind::kElementwise;
  const auto& [b, head, head_kv, first_row, s] = place;
  const int head_dim = static_cast<int>(params.head_dim), warp_row = warp_id() * 16 * kM, end = lower(s.rows, part.end);
  const ScoreRule rule = score_rule(params, b, head);
  const float scale = kElementwise ? 1.0f : rule.scale_log2;  // of what apply_windows left
  const int64_t statistics = statistic_row(params, s, b, head);
  constexpr float kLn2 = 0.6931471805599453f;
  float* logsumexp = params.logsumexp.data == nullptr ? nullptr : static_cast<float*>(params.logsumexp.data) + statistics;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = row_sum(total[m][half]);
      const int row = first_row + warp_row + 16 * m + 8 * half + lane_id() / 4;
      if (logsumexp != nullptr && lane_id() % 4 == 0 && row < end) {
        const bool any = sum > 0.0f && row < s.queries;
        ptx::store_global(logsumexp + row, any ? (largest[m][half] * scale + ptx::log2_fast(sum)) * kLn2 : -kInfinity);
      }
      const float factor = sum == 0.0f ? 0.0f : 1.0f / sum;
#pragma unroll
      for (int n = 0; n < kD; ++n) {
        output[m][n][2 * half] *= factor;
        output[m][n][2 * half + 1] *= factor;
      }
    }
  }

  const float gate = gate_of(params, s, head);
  if (s.slots > 0) {
    // First the maximum and the sum over all slots, then their weights; up to 16 slots are one tile, already here.
    const float before = kElementwise ? rule.scale_log2 : 1.0f;  // what the scores are scaled by before the softmax
    float c[kM][2][4], weight[kM][2];
    RunningSoftmax softmax[kM];
    for (int slot = 0; slot < s.slots; slot += kPrefixTile) {
      if (slot > 0 || !Memory::kPrefixApart || !part.is_whole()) {
        __syncthreads();
        copy_prefix<T>(memory, params, place, slot);
        ptx::commit_async_copies();
        ptx::wait_async_copies<0>();
        __syncthreads();
      }
      prefix_scores(c, memory.query, warp_row, memory.prefix_key, s.slots - slot, before);
#pragma unroll
      for (int m = 0; m < kM; ++m) softmax[m].add(c[m], c[m], scale);
    }
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      softmax[m].finish();
#pragma unroll
      for (int half = 0; half < 2; ++half) weight[m][half] = gate / softmax[m].total[half];
    }
    for (int slot = 0; slot < s.slots; slot += kPrefixTile) {
      if (s.slots > kPrefixTile) {
        __syncthreads();
        copy_prefix<T>(memory, params, place, slot);
        ptx::commit_async_copies();
        ptx::wait_async_copies<0>();
        __syncthreads();
        prefix_scores(c, memory.query, warp_row, memory.prefix_key, s.slots - slot, before);
      }
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            c[m][n][e] = ptx::exp2_fast((c[m][n][e] - softmax[m].largest[e / 2]) * scale) * weight[m][e / 2];
          }
        }
      }
      multiply_pb(output, c, memory.prefix_value, 0);
    }
  }

  T* result = head_pointer<T>(params.output, b, head, s.first_query);
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    // A sequence whose prefix index is out of range becomes NaN here.
    store_rows<kD>(result, params.output.stride_row, first_row + warp_row + 16 * m, end, output[m], s.bad_prefix ? gate : 1.0f,
                   0, head_dim, s.queries);
  }
}

// The windows of the block's rows within the part that comes, and the part itself. A barrier has to follow.
template <class Memory>
__device__ __forceinline__ void begin_pass(const Memory& memory, const ZeroGateParams& params, const ForwardPlace& place,
                                           const Part& part) {
  constexpr int kRows = Memory::Tiles::kRows;
  const auto within = [&](int key) { return lower(higher(key, part.keys.begin), part.keys.end); };
  for (int row = ptx::thread_index(); row < kRows; row += kThreads) {
    const Window window = window_of(params, place.s, lower(place.first_row + row, place.s.queries - 1));
    ptx::store_shared(memory.window_at(row), Window{within(window.begin), within(window.end)});
  }
  if (ptx::thread_index() == 0) memory.part.store(part);
}

// Whether another pass has to follow, which has begun.
template <class T, int kHeadDim, ForwardKind kKind>
__device__ __forceinline__ bool forward_pass(const ForwardMemory<T, kHeadDim, kKind>& memory, const ZeroGateParams& params,
                                             int row_blocks) {
  using Tiles = typename ForwardMemory<T, kHeadDim, kKind>::Tiles;
  constexpr bool kElementwise = kKind == ForwardKind::kElementwise;
  constexpr int kM = Tiles::kRowTiles, kN = Tiles::kKeys / 8, kD = kHeadDim / 8;
  const ForwardPlace place = place_of<Tiles::kRows>(params, ptx::block_index(), row_blocks);
  const auto& [b, head, head_kv, first_row, s] = place;
  const int head_dim = static_cast<int>(params.head_dim), warp_row = warp_id() * 16 * kM;
  const ScoreRule rule = score_rule(params, b, head);
  const float scale = kElementwise ? 1.0f : rule.scale_log2;  // of what apply_windows leaves

  // Pointers found anew for each tile: eight registers that 255 a thread do not have room for.
  const auto copy_tile = [&](const auto& tile, const TensorView& from, int at) {
    const T* rows = head_pointer<const T>(from, ptx::opaque(b), ptx::opaque(head_kv), s.first_key);
    const Window keys = memory.part.keys();
    copy_rows<kThreads>(tile, rows, from.stride_row, at, keys.begin, keys.end, head_dim, ptx::thread_index());
    ptx::commit_async_copies();
  };
  __syncthreads();  // the windows and the part are there
  // A tile is the keys [at, at + kKeys), from the first to the last key that any row sees.
  const int begin = ptx::load_shared<Window>(memory.window_at(0)).begin;
  const int end = ptx::load_shared<Window>(memory.window_at(Tiles::kRows - 1)).end;
  if (begin < end) copy_tile(memory.key, params.key, begin);

  float output[kM][kD][4], largest[kM][2], total[kM][2];
  set_zero(output);
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    largest[m][0] = largest[m][1] = -kInfinity;
    total[m][0] = total[m][1] = 0.0f;
  }

#pragma unroll 1
  for (int at = begin; at < end; at += Tiles::kKeys) {
    // Of the first and the last row of the warp: neither end of a window decreases from row to row.
    const Window first = ptx::load_shared<Window>(memory.window_at(warp_row));
    const Window last = ptx::load_shared<Window>(memory.window_at(warp_row + 16 * kM - 1));
    const bool any = at < last.end && at + Tiles::kKeys > first.begin;
    const bool whole = at >= last.begin && at + Tiles::kKeys <= first.end;
    ptx::wait_async_copies<0>();
    __syncthreads();  // K (and Q) is there; every warp is done with V
    copy_tile(memory.value, params.value, at);
    float c[kM][kN][4];
    set_zero(c);
    if (any) multiply_abt(c, memory.query, warp_row, memory.key, 0);
    ptx::wait_async_copies<0>();
    __syncthreads();  // V is there; every warp is done with K
    if (at + Tiles::kKeys < end) copy_tile(memory.key, params.key, at + Tiles::kKeys);
    if (!any) continue;
    if (kElementwise || !whole) {
      apply_windows<kElementwise>(c, rule, s, memory.window_at(warp_row), first_row + warp_row, at);
    }
    softmax_step(c, largest, total, output, scale);
    multiply_pb(output, c, memory.value, 0);
  }
  ptx::commit_async_copies();
  ptx::wait_async_copies<0>();
  const ForwardPlace same = place_of<Tiles::kRows>(params, ptx::block_index(), row_blocks);
  const Part part = memory.part.load();
  const bool again = __syncthreads_or(is_token_tiled(params) && part.is_whole() && !all_finite(output));
  if (!again) finish_forward<T, kHeadDim, kKind>(params, same, memory, part, output, largest, total);
  if (!again && part.begin <= same.first_row) return false;
  // Every warp has asked for its last window and for the part, which are all that is written before the next barrier.
  begin_pass(memory, params, same, part_of_queries(params, same.s, again ? same.s.rows : part.begin));
  return true;
}

template <class T, int kHeadDim, ForwardKind kKind>
__global__ void __launch_bounds__(kThreads, (kIsTuned<T, kHeadDim> ? 2 : 1))
    forward_kernel(const __grid_constant__ ZeroGateParams params, int row_blocks) {
  using Memory = ForwardMemory<T, kHeadDim, kKind>;
  const Memory memory(ptx::dynamic_shared_memory());
  const ForwardPlace place = place_of<Memory::Tiles::kRows>(params, ptx::block_index(), row_blocks);
  const auto& [b, head, head_kv, first_row, s] = place;
  if (first_row >= s.rows) return;
  if (first_row >= s.queries) return write_empty_rows<T, Memory::Tiles::kRows>(params, place);
  copy_rows<kThreads>(memory.query, head_pointer<const T>(params.query, b, head, s.first_query), params.query.stride_row,
                      first_row, 0, s.queries, static_cast<int>(params.head_dim), ptx::thread_index());
  if (Memory::kPrefixApart && s.slots > 0) copy_prefix<T>(memory, params, place, 0);
  begin_pass(memory, params, place, whole_part(s));
#pragma unroll 1
  while (forward_pass<T, kHeadDim, kKind>(memory, params, row_blocks)) {
  }
}

}  // namespace lak::sm80
