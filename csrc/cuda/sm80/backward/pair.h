// Backward of the words, one pair of kRows queries and kKeys keys:
//
//   P = 2^((Q K^T - shift) factor)   dS = P * (dO V^T - D_w)
//
// P and dS go to shared memory in T, where the products that sum over queries or over keys find them: dV += P^T dO,
// dK += dS^T Q, dQ += dS K. A block that owns keys goes over the queries (`add_over_queries`), one that owns queries over the
// keys (words.h).
//
// Shared memory: Q, dO [kRows, D]; K, V [kKeys, D]; P, dS [kRows, kKeys]; shift, D_w, float32 also rest [kRows]; windows [kRows].
// Nothing is there twice: each tile is copied while the products run that read the others.
#pragma once

#include "sm80/backward/workspace.h"
#include "sm80/scores.h"

namespace lak::sm80 {

// A Part and other numbers of a block, in the workspace: shared memory has no room left for them, registers neither.
struct BlockPart {
  const ZeroGateParams* params;

  // Found anew each time, for the same reason.
  __device__ __forceinline__ Window* at(int which) const {
    return static_cast<Window*>(params->workspace) + static_cast<int64_t>(ptx::block_index()) * kWindowsOfBlock + which;
  }
  __device__ __forceinline__ Window rows() const { return ptx::load_global(at(0)); }
  __device__ __forceinline__ Window keys() const { return ptx::load_global(at(1)); }
  __device__ __forceinline__ Part load() const {
    const Window stored = ptx::load_global(at(2));
    return {rows(), keys(), stored.end, stored.begin};
  }
  // By a single thread, between two barriers.
  __device__ __forceinline__ void store(const Part& part) const {
    ptx::store_global(at(0), part.rows);
    ptx::store_global(at(1), part.keys);
    ptx::store_global(at(2), Window{part.begin, part.end});
  }
};

// kInParts: tiles are computed again where they have to be (Part, in problem.h).
template <class T, int kHeadDim, class Tiles, bool kInParts = false>
struct PairMemory {
  static constexpr int kRows = Tiles::kRows, kKeys = Tiles::kKeys, kWindow = static_cast<int>(sizeof(Window));
  using RowTile = SharedTile<T, kRows, kHeadDim>;
  using KeyTile = SharedTile<T, kKeys, kHeadDim>;
  using ScoreTile = SharedTile<T, kRows, kKeys>;
  static constexpr int kStatistics = kIsHalf<T> ? 2 : 3;
  static constexpr int kBytes =
      2 * (RowTile::kBytes + KeyTile::kBytes + ScoreTile::kBytes) + kRows * (kWindow + kStatistics * 4);

  RowTile query, doutput;
  KeyTile key, value;
  ScoreTile probabilities, dscores;
  BlockPart part;  // kInParts
  uint32_t windows;

  __device__ __forceinline__ explicit PairMemory(uint32_t base)
      : query{base}, doutput{query.base + RowTile::kBytes}, key{doutput.base + RowTile::kBytes},
        value{key.base + KeyTile::kBytes}, probabilities{value.base + KeyTile::kBytes},
        dscores{probabilities.base + ScoreTile::kBytes}, part{nullptr}, windows(dscores.base + ScoreTile::kBytes) {}
  __device__ __forceinline__ uint32_t window_at(int row) const { return windows + row * kWindow; }
  __device__ __forceinline__ uint32_t shift_at(int row) const { return window_at(kRows) + row * 4; }
  __device__ __forceinline__ uint32_t delta_at(int row) const { return shift_at(kRows) + row * 4; }
  __device__ __forceinline__ uint32_t rest_at(int row) const { return delta_at(kRows) + row * 4; }

  // Rows and keys that are copied.
  __device__ __forceinline__ Window rows_of_part(const Sequence& s) const {
    if constexpr (kInParts) return part.rows();
    return {0, s.queries};
  }
  __device__ __forceinline__ Window keys_of_part(const Sequence& s) const {
    if constexpr (kInParts) return part.keys();
    return {s.key_begin, s.key_end};
  }
  // Every warp is done with all of it; what is copied from now on belongs to this part.
  __device__ __forceinline__ void begin_pass(const Part& next) const {
    __syncthreads();
    if (ptx::thread_index() == 0) part.store(next);
    __syncthreads();
  }
};

// What a block copies, and where from. Every function starts a copy; the caller commits.
template <class T, int kHeadDim, class Tiles, bool kInParts = false>
struct PairCopies {
  using Memory = PairMemory<T, kHeadDim, Tiles, kInParts>;
  const ZeroGateParams& params;
  const Memory& memory;
  const Sequence& s;
  int b, head_kv;

  __device__ __forceinline__ void query(int head, int first_row) const { rows(memory.query, params.query, head, first_row); }
  __device__ __forceinline__ void doutput(int head, int first_row) const {
    rows(memory.doutput, params.doutput, head, first_row);
  }
  __device__ __forceinline__ void key(int first_key) const { keys(memory.key, params.key, first_key); }
  __device__ __forceinline__ void value(int first_key) const { keys(memory.value, params.value, first_key); }

  // Windows, shift, D_w (and rest) of the rows: 16 bytes a thread, up to the padding.
  __device__ __forceinline__ void statistics(const BackwardWorkspace& workspace, int head, int first_row) const {
    constexpr int kChunks = Tiles::kRows / 4;
    const int64_t at = workspace.row_of(b, ptx::opaque(head)) + first_row;
    for (int i = ptx::thread_index(); i < (2 + Memory::kStatistics) * kChunks; i += Tiles::kThreads) {
      const int which = i / kChunks - 2, row = i % kChunks * 4;
      if (which < 0) {
        ptx::copy_async_16(memory.window_at(2 * i), workspace.windows + b * workspace.padded_rows + first_row + 2 * i, true);
      } else {
        const float* from = which == 0 ? workspace.shift : which == 1 ? workspace.delta : workspace.rest;
        ptx::copy_async_16(memory.shift_at(which * Tiles::kRows + row), from + at + row, true);
      }
    }
  }

  // Statistics of the rows beside the part become 0 as well, once they are there.
  __device__ __forceinline__ void clear_statistics_beside_part(int first_row) const {
    if (memory.part.load().is_whole()) return;
    const Window part = memory.part.rows();
    for (int row = ptx::thread_index(); row < Tiles::kRows; row += Tiles::kThreads) {
      if (first_row + row >= part.begin && first_row + row < part.end) continue;
      for (int which = 0; which < Memory::kStatistics; ++which) {
        ptx::store_shared(memory.shift_at(which * Tiles::kRows + row), 0.0f);
      }
    }
    __syncthreads();
  }

 private:
  template <class Tile>
  __device__ __forceinline__ void rows(const Tile& tile, const TensorView& from, int head, int first_row) const {
    const T* data = head_pointer<const T>(from, ptx::opaque(b), head, s.first_query);
    const Window part = memory.rows_of_part(s);
    copy_rows<Tiles::kThreads>(tile, data, from.stride_row, first_row, part.begin, part.end, static_cast<int>(params.head_dim),
                               ptx::thread_index());
  }
  template <class Tile>
  __device__ __forceinline__ void keys(const Tile& tile, const TensorView& from, int first_key) const {
    const T* data = head_pointer<const T>(from, ptx::opaque(b), ptx::opaque(head_kv), s.first_key);
    const Window part = memory.keys_of_part(s);
    copy_rows<Tiles::kThreads>(tile, data, from.stride_row, first_key, part.begin, part.end, static_cast<int>(params.head_dim),
                               ptx::thread_index());
  }
};

// How scores become probabilities, the same for all pairs of a block.
struct PairRule {
  ScoreRule rule;
  bool elementwise;
  float factor;
};
template <class T, int kHeadDim>
__device__ __forceinline__ PairRule pair_rule(const ZeroGateParams& params, int b, int head) {
  const ScoreRule rule = score_rule(params, b, head);
  const bool elementwise = !kIsTuned<T, kHeadDim> || needs_elementwise_scores(params);
  return {rule, elementwise, elementwise ? 1.0f : rule.scale_log2};
}

// c: Q K^T, d: dO V^T, of the warp's part. dS goes to shared memory, and P where dV will ask for it.
template <bool kPlain, class T, int kHeadDim, class Tiles, bool kInParts, int kM, int kN>
__device__ __forceinline__ void store_scores(const PairMemory<T, kHeadDim, Tiles, kInParts>& memory, const PairRule& rule,
                                             const Sequence& s, int first_row, int first_key, float (&c)[kM][kN][4],
                                             float (&d)[kM][kN][4], bool needs_probabilities) {
  const int row = Tiles::Scores::row(warp_id()), column = Tiles::Scores::column(warp_id()), lane = lane_id();
  // Of the first and the last row of the warp: neither end of a window decreases from row to row.
  const Window first = ptx::load_shared<Window>(memory.window_at(row));
  const Window last = ptx::load_shared<Window>(memory.window_at(row + 16 * kM - 1));
  const int at = first_key + column;
  if (!kPlain && rule.elementwise) {
    apply_windows<true>(c, rule.rule, s, memory.window_at(row), first_row + row, at);
  } else if (at < last.begin || at + 8 * kN > first.end) {
    apply_windows<false>(c, rule.rule, s, memory.window_at(row), first_row + row, at);
  }
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int own = row + 16 * m + 8 * half + lane / 4;
      const float shift = ptx::load_shared<float>(memory.shift_at(own)), delta = ptx::load_shared<float>(memory.delta_at(own));
      const float rest = kIsHalf<T> ? 0.0f : ptx::load_shared<float>(memory.rest_at(own));
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          c[m][n][e] = word_probability<T>(c[m][n][e], rule.factor, shift, rest);
          d[m][n][e] = c[m][n][e] * (d[m][n][e] - delta);
        }
      }
    }
  }
  if (needs_probabilities) store_tile(memory.probabilities, row, column, c);
  store_tile(memory.dscores, row, column, d);
}

// dQ += dS_p Kp for one tile of slots: the warp's rows from `row` on, columns from `column` on.
template <class T, int kHeadDim, int kM, int kN>
__device__ __forceinline__ void add_prefix_product(float (&dquery)[kM][kN][4], SharedTile<T, kPrefixTile, kHeadDim> prefix_key,
                                                   const BackwardWorkspace& workspace, int b, int head, int row, int slot,
                                                   int column) {
  const int64_t stride = workspace.dscore_slots;
  FragmentA<T> a[kM];
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    load_a_rows(a[m], static_cast<const T*>(workspace.dscores) + (workspace.row_of(b, head) + row + 16 * m) * stride + slot,
                stride, static_cast<int>(stride) - slot);
  }
  multiply_add_row(dquery, a, prefix_key, 0, column);
}

// The tiles of queries that see keys of a tile; end is 0 where none does.
template <class Tiles>
__device__ __forceinline__ Window row_tiles_seeing(const ZeroGateParams& params, const Sequence& s, int first_key) {
  const Window rows = rows_seeing(params, s, first_key, Tiles::kKeys);
  if (rows.begin >= rows.end) return {0, 0};
  return {rows.begin / Tiles::kRows, (rows.end + Tiles::kRows - 1) / Tiles::kRows};
}

// dK and dV of the block's keys, over the `tiles()` of queries that see them, of head after head of the group; with kAddsQueries also
// dQ, to where the blocks add theirs. K and V are in flight or there already. carried_tile: the queries whose P and dS are in
// shared memory beside their Q and dO (of a single head), -1 where there are none; they come first.
template <bool kAddsQueries, class T, int kHeadDim, class Tiles, bool kInParts, class Range, int kM, int kN>
__device__ __forceinline__ void add_over_queries(const PairCopies<T, kHeadDim, Tiles, kInParts>& copies,
                                                 const BackwardWorkspace& workspace, int first_key, const Range& tiles,
                                                 int carried_tile, float (&dkey)[kM][kN][4], float (&dvalue)[kM][kN][4]) {
  using Scores = typename Tiles::Scores;
  using KeyGradients = typename Tiles::KeyGradients;
  const ZeroGateParams& params = copies.params;
  const Sequence& s = copies.s;
  const auto& memory = copies.memory;
  const int group = static_cast<int>(params.heads_q / params.heads_kv), warp = warp_id();
  // A step is a head and a tile of queries; before the first of them, the tile that is carried.
  struct Step {
    int head, tile;
  };
  const auto next_of = [&](const Step& step) {
    Step next{step.head, step.tile + 1};
    if (next.tile == carried_tile) ++next.tile;
    const Window range = tiles();
    if (next.tile >= range.end) next = {step.head + 1, range.begin};
    return next;
  };
  const auto is_step = [&](const Step& step) { return step.tile < tiles().end && step.head < (copies.head_kv + 1) * group; };
  const auto is_carried = [&](const Step& step) { return step.tile < tiles().begin; };
  const auto row_of = [](const Step& step) { return step.tile * Tiles::kRows; };  // not of the carried one, which is there
  const auto copy_query = [&](const Step& step) {
    copies.query(step.head, row_of(step));
    copies.statistics(workspace, step.head, row_of(step));
    ptx::commit_async_copies();
  };
  const auto copy_doutput = [&](const Step& step) {
    copies.doutput(step.head, row_of(step));
    ptx::commit_async_copies();
  };
  Step step{copies.head_kv * group, carried_tile >= 0 ? tiles().begin - 1 : tiles().begin};
  if (!is_carried(step) && is_step(step)) {
    copy_query(step);
    copy_doutput(step);
    ptx::wait_async_copies<1>();
    __syncthreads();
  }
#pragma unroll 1
  for (; is_step(step); step = next_of(step)) {
    if (!is_carried(step)) {
      float c[Scores::kM][Scores::kN][4], d[Scores::kM][Scores::kN][4];
      set_zero(c);
      set_zero(d);
      if (Scores::has(warp)) multiply_abt(c, memory.query, Scores::row(warp), memory.key, Scores::column(warp));
      ptx::wait_async_copies<0>();
      __syncthreads();  // dO is there
      if constexpr (kInParts) copies.clear_statistics_beside_part(row_of(step));
      if (Scores::has(warp)) {
        multiply_abt(d, memory.doutput, Scores::row(warp), memory.value, Scores::column(warp));
        const PairRule rule = pair_rule<T, kHeadDim>(params, copies.b, step.head);
        store_scores<kAddsQueries>(memory, rule, s, row_of(step), first_key, c, d, true);
      }
    }
    __syncthreads();  // P and dS are there
    multiply_atb(dkey, memory.dscores, KeyGradients::row(warp), memory.query, KeyGradients::column(warp));
    __syncthreads();  // every warp is done with Q
    if (is_step(next_of(step))) copy_query(next_of(step));
    multiply_atb(dvalue, memory.probabilities, KeyGradients::row(warp), memory.doutput, KeyGradients::column(warp));
    if constexpr (kAddsQueries) {
      using QueryGradients = typename Tiles::QueryGradients;
      const int row = QueryGradients::row(warp), column = QueryGradients::column(warp);
      float dquery[QueryGradients::kM][QueryGradients::kN][4];
      set_zero(dquery);
      multiply_ab(dquery, memory.dscores, row, memory.key, column);
#pragma unroll
      for (int m = 0; m < QueryGradients::kM; ++m) {
        float* sums = workspace.dquery_fragment(copies.b, step.head, row_of(step) + row + 16 * m, column);
#pragma unroll
        for (int n = 0; n < QueryGradients::kN; ++n) {
          if (column + 8 * n >= params.head_dim) continue;
#pragma unroll
          for (int e = 0; e < 4; ++e) ptx::add_global(sums + 128 * n + 32 * e + lane_id(), dquery[m][n][e]);
        }
      }
    }
    ptx::wait_async_copies<0>();
    __syncthreads();  // the next Q is there; every warp is done with dO, P and dS
    if (is_step(next_of(step))) copy_doutput(next_of(step));
  }
  ptx::wait_async_copies<0>();  // K and V of keys that no query sees
}

// dK (times `scale`) and dV of the block's keys before `end`.
template <class T, int kHeadDim, class Tiles, bool kInParts, int kM, int kN>
__device__ __forceinline__ void store_key_gradients(const PairCopies<T, kHeadDim, Tiles, kInParts>& copies, int first_key,
                                                    int end, const float (&dkey)[kM][kN][4], const float (&dvalue)[kM][kN][4]) {
  const ZeroGateParams& params = copies.params;
  const Sequence& s = copies.s;
  const int row = Tiles::KeyGradients::row(warp_id()), column = Tiles::KeyGradients::column(warp_id());
  const auto store = [&](const TensorView& to, const float (&c)[kM][kN][4], float factor) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      store_rows<kN>(head_pointer<T>(to, copies.b, copies.head_kv, s.first_key), to.stride_row,
                     ptx::opaque(first_key) + row + 16 * m, lower(s.key_rows, end), c[m], factor, column,
                     static_cast<int>(params.head_dim), s.key_rows);
    }
  };
  store(params.dkey, dkey, static_cast<float>(params.scale));
  store(params.dvalue, dvalue, 1.0f);
}

}  // namespace lak::sm80
