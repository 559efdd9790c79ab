// Backward of the words without a sum across blocks: a block owns the queries of a tile and the keys of the same tile. It goes
// over the keys that its queries see for dQ, and over the queries that see its keys for dK and dV. The pair of its own queries and
// keys serves both. What a block writes depends on no other: every gradient has one order of sums, no memory is added to, and
// each byte of the inputs comes from memory once.
//
// Of a packed batch of short sequences most pairs are a block's own or its neighbour's. For long sequences the scores that are
// computed twice cost more than the traffic of sums across blocks (backward/keys.h).
#pragma once

#include "sm80/backward/pair.h"

namespace lak::sm80 {

template <class T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, (kIsTuned<T, kHeadDim> ? 2 : 1))
    backward_words_kernel(const __grid_constant__ ZeroGateParams p, int tiles) {
  using Tiles = WordTiles<T, kHeadDim, kWarps>;
  using Scores = typename Tiles::Scores;
  using KeyGradients = typename Tiles::KeyGradients;
  using QueryGradients = typename Tiles::QueryGradients;
  using Memory = PairMemory<T, kHeadDim, Tiles>;
  constexpr int kSide = Tiles::kRows;
  static_assert(Tiles::kRows == Tiles::kKeys, "the rows and the keys of a tile have the same numbers");
  const Memory memory(ptx::dynamic_shared_memory());

  // The first tiles are seen by the most queries, the last see the most keys.
  const int tile = static_cast<int>(blockIdx.x % tiles), first = tile * kSide;
  const int head_kv = static_cast<int>(blockIdx.x / tiles % p.heads_kv), b = static_cast<int>(blockIdx.x / tiles / p.heads_kv);
  const Sequence s = sequence_of(p, b);
  const int group = static_cast<int>(p.heads_q / p.heads_kv), warp = warp_id(), head_dim = static_cast<int>(p.head_dim);
  const bool queries = p.dquery.data != nullptr && first < s.rows, keys = p.dkey.data != nullptr && first < s.key_rows;
  const BackwardWorkspace workspace = backward_workspace<T, kHeadDim>(p);
  const PairCopies<T, kHeadDim, Tiles> copies{p, memory, s, b, head_kv};

  // The keys that its queries see.
  Window range{0, 0};
  if (queries && first < s.queries) {
    const Window* windows = workspace.windows + b * workspace.padded_rows + first;
    range.begin = ptx::load_global(windows).begin / kSide;
    range.end = (ptx::load_global(windows + kSide - 1).end + kSide - 1) / kSide;
  }
  // The own pair comes last, so that it can stay for dK and dV. With several query heads their accumulators would have to wait
  // for all of them, which is more than there are registers.
  const Window row_tiles = keys ? row_tiles_seeing<Tiles>(p, s, first) : Window{0, 0};
  const bool carries = queries && keys && group == 1 && tile >= range.begin && tile < range.end && tile >= row_tiles.begin &&
                       tile < row_tiles.end;
  const int steps = range.end - range.begin;
  const auto key_of = [&](int step) {
    const int at = range.begin + step;
    if (!carries) return at * kSide;
    return (at == range.end - 1 ? tile : at + (at >= tile)) * kSide;
  };
  // The prefix's K: where P and dS will be if it fits there, else in the place of K.
  using PrefixTile = SharedTile<T, kPrefixTile, kHeadDim>;
  constexpr bool kPrefixApart = PrefixTile::kBytes <= 2 * Memory::ScoreTile::kBytes;
  const PrefixTile prefix_key{kPrefixApart ? memory.probabilities.base : memory.key.base};
  const auto copy_prefix = [&](int slot) {
    copy_rows<kThreads>(prefix_key, head_pointer<const T>(p.prefix_key, s.prefix, head_kv, 0), p.prefix_key.stride_row, slot, 0,
                        s.slots, head_dim, ptx::thread_index());
  };

  for (int head = head_kv * group; queries && head < (head_kv + 1) * group; ++head) {
    const int row = QueryGradients::row(warp), column = QueryGradients::column(warp);
    float dquery[QueryGradients::kM][QueryGradients::kN][4];
    set_zero(dquery);
    if (first < s.queries) {
      copies.query(head, first);
      copies.doutput(head, first);
      copies.statistics(workspace, head, first);
      if (s.slots > 0) copy_prefix(0);
    }
    if (steps > 0) copies.value(key_of(0));
    ptx::commit_async_copies();
    if (steps > 0 && kPrefixApart) copies.key(key_of(0));
    ptx::commit_async_copies();
    ptx::wait_async_copies<1>();
    __syncthreads();  // Q, dO, the statistics, the prefix and the first V are there
    for (int slot = 0; first < s.queries && slot < s.slots; slot += kPrefixTile) {
      if (slot > 0) {
        __syncthreads();
        copy_prefix(slot);
        ptx::commit_async_copies();
        ptx::wait_async_copies<0>();
        __syncthreads();
      }
      add_prefix_product(dquery, prefix_key, workspace, prefix_tiles(p) * kPrefixTile, b, head, first + row, slot, column);
    }
    if (!kPrefixApart) {
      __syncthreads();
      if (steps > 0) copies.key(key_of(0));
      ptx::commit_async_copies();
    }
    const PairRule rule = pair_rule<T, kHeadDim>(p, b, head);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      float c[Scores::kM][Scores::kN][4], d[Scores::kM][Scores::kN][4];
      set_zero(c);
      set_zero(d);
      if (Scores::has(warp)) multiply_abt(d, memory.doutput, Scores::row(warp), memory.value, Scores::column(warp));
      ptx::wait_async_copies<0>();
      __syncthreads();  // K is there; every warp is done with V
      if (step + 1 < steps) {
        copies.value(key_of(step + 1));
        ptx::commit_async_copies();
      }
      if (Scores::has(warp)) {
        multiply_abt(c, memory.query, Scores::row(warp), memory.key, Scores::column(warp));
        store_scores(memory, rule, s, first, key_of(step), c, d, carries && step + 1 == steps);
      }
      __syncthreads();  // dS is there
      multiply_ab(dquery, memory.dscores, row, memory.key, column);
      if (step + 1 == steps) break;
      ptx::wait_async_copies<0>();
      __syncthreads();  // the next V is there; every warp is done with K and dS
      copies.key(key_of(step + 1));
      ptx::commit_async_copies();
    }
    const float factor = static_cast<float>(p.scale) * (s.bad_prefix ? gate_of(p, s, head) : 1.0f);
#pragma unroll
    for (int m = 0; m < QueryGradients::kM; ++m) {
      store_rows<QueryGradients::kN>(head_pointer<T>(p.dquery, b, head, s.first_query), p.dquery.stride_row,
                                     first + row + 16 * m, s.rows, dquery[m], factor, column, head_dim, s.queries);
    }
    if (!carries) __syncthreads();  // every warp is done with all of shared memory
  }
  if (!keys) return;

  float dkey[KeyGradients::kM][KeyGradients::kN][4], dvalue[KeyGradients::kM][KeyGradients::kN][4];
  set_zero(dkey);
  set_zero(dvalue);
  if (!carries) {
    copies.key(first);
    copies.value(first);
    ptx::commit_async_copies();
  }
  add_over_queries<false>(copies, workspace, first, row_tiles, carries ? tile : -1, dkey, dvalue);
  store_key_gradients(copies, first, dkey, dvalue);
}

}  // namespace lak::sm80
