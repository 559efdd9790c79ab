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

// In the workspace: which pairs the block has.
template <class T, int kHeadDim>
struct WordsMemory : PairMemory<T, kHeadDim, WordTiles<T, kHeadDim, kWarps>, true> {
  using Tiles = WordTiles<T, kHeadDim, kWarps>;
  using Pair = PairMemory<T, kHeadDim, Tiles, true>;
  static_assert(Tiles::kRows == Tiles::kKeys, "the rows and the keys of a tile have the same numbers");
  static constexpr int kSide = Tiles::kRows;
  using Pair::part;

  __device__ __forceinline__ WordsMemory(const ZeroGateParams& params, uint32_t base) : Pair(base) { part.params = &params; }
  // Tiles of keys that its queries see, tiles of queries that see its keys.
  __device__ __forceinline__ Window key_tiles() const { return ptx::load_global(part.at(3)); }
  __device__ __forceinline__ Window row_tiles() const { return ptx::load_global(part.at(4)); }
  // The pair of its own queries and keys comes last for dQ, so that it can stay for dK and dV.
  __device__ __forceinline__ bool carries() const { return ptx::load_global(part.at(5)).end != 0; }

  __device__ __forceinline__ void store_plan(Window key_tiles, Window row_tiles) const {
    ptx::store_global(part.at(3), key_tiles);
    ptx::store_global(part.at(4), row_tiles);
  }
  __device__ __forceinline__ void store_carries(bool carries) const { ptx::store_global(part.at(5), Window{0, carries}); }
};

// What a block owns. It is found anew for every pass, so that nothing of it takes registers in another's loop.
struct WordsPlace {
  int b, head_kv, group, tile;
  Sequence s;

  __device__ __forceinline__ WordsPlace(const ZeroGateParams& params, int tiles) {
    const unsigned index = ptx::block_index();
    // The first tiles are seen by the most queries, the last see the most keys.
    tile = static_cast<int>(index % tiles);
    head_kv = static_cast<int>(index / tiles % params.heads_kv);
    b = static_cast<int>(index / tiles / params.heads_kv);
    group = static_cast<int>(params.heads_q / params.heads_kv);
    s = sequence_of(params, b);
  }
};

// Tiles with several sequences and results that are not finite are computed again. The whole block asks.
__device__ __forceinline__ bool must_be_redone(const ZeroGateParams& params, const Part& part, bool finite) {
  return is_token_tiled(params) && part.is_whole() && __syncthreads_or(!finite) != 0;
}

// dQ of one head. Whether that head is done; else another pass has begun.
template <class T, int kHeadDim>
__device__ __forceinline__ bool queries_pass(const ZeroGateParams& params, int tiles, int head_of_group) {
  using Memory = WordsMemory<T, kHeadDim>;
  const Memory memory(params, ptx::opaque(ptx::dynamic_shared_memory()));
  using Tiles = typename Memory::Tiles;
  using Scores = typename Tiles::Scores;
  using QueryGradients = typename Tiles::QueryGradients;
  const WordsPlace place(params, tiles);
  const Sequence& s = place.s;
  const int b = place.b, tile = place.tile, first = tile * Memory::kSide, warp = warp_id();
  const int head = place.head_kv * place.group + head_of_group, head_dim = static_cast<int>(params.head_dim);
  const BackwardWorkspace workspace = backward_workspace<T, kHeadDim>(params);
  const PairCopies<T, kHeadDim, Tiles, true> copies{params, memory, s, b, place.head_kv};
  const Window range = memory.key_tiles();
  const bool carries = memory.carries();
  const int steps = range.end - range.begin;
  const auto key_of = [&](int step) {
    const int at = range.begin + step;
    if (!carries) return at * Memory::kSide;
    return (at == range.end - 1 ? tile : at + (at >= tile)) * Memory::kSide;
  };
  // The prefix's K: where P and dS will be if it fits there, else in the place of K.
  using PrefixTile = SharedTile<T, kPrefixTile, kHeadDim>;
  constexpr bool kPrefixApart = PrefixTile::kBytes <= 2 * Memory::ScoreTile::kBytes;
  const PrefixTile prefix_key{kPrefixApart ? memory.probabilities.base : memory.key.base};
  const auto copy_prefix = [&](int slot) {
    copy_rows<kThreads>(prefix_key, head_pointer<const T>(params.prefix_key, s.prefix, place.head_kv, 0),
                        params.prefix_key.stride_row, slot, 0, s.slots, head_dim, ptx::thread_index());
  };

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
    add_prefix_product(dquery, prefix_key, workspace, b, head, first + row, slot, column);
  }
  if (!kPrefixApart) {
    __syncthreads();
    if (steps > 0) copies.key(key_of(0));
    ptx::commit_async_copies();
  }
  const PairRule rule = pair_rule<T, kHeadDim>(params, b, head);
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
      store_scores<false>(memory, rule, s, first, key_of(step), c, d, carries && step + 1 == steps);
    }
    __syncthreads();  // dS is there
    multiply_ab(dquery, memory.dscores, row, memory.key, column);
    if (step + 1 == steps) break;
    ptx::wait_async_copies<0>();
    __syncthreads();  // the next V is there; every warp is done with K and dS
    copies.key(key_of(step + 1));
    ptx::commit_async_copies();
  }

  const Part part = memory.part.load();
  const bool again = must_be_redone(params, part, all_finite(dquery));
  const WordsPlace same(params, tiles);
  const int same_first = same.tile * Memory::kSide;
  const float factor = static_cast<float>(params.scale) * (same.s.bad_prefix ? gate_of(params, same.s, head) : 1.0f);
#pragma unroll
  for (int m = 0; m < QueryGradients::kM && !again; ++m) {
    store_rows<QueryGradients::kN>(head_pointer<T>(params.dquery, same.b, head, same.s.first_query), params.dquery.stride_row,
                                   same_first + row + 16 * m, lower(same.s.rows, part.end), dquery[m], factor, column, head_dim,
                                   same.s.queries);
  }
  if (again || part.begin > same_first) {
    memory.begin_pass(part_of_queries(params, same.s, again ? same.s.rows : part.begin));
    if (threadIdx.x == 0) memory.store_carries(false);
    __syncthreads();
    return false;
  }
  if (!part.is_whole()) memory.begin_pass(whole_part(same.s));
  if (!memory.carries()) __syncthreads();  // every warp is done with all of shared memory
  return true;
}

// dK and dV. Whether they are done; else another pass has begun.
template <class T, int kHeadDim>
__device__ __forceinline__ bool keys_pass(const ZeroGateParams& params, int tiles) {
  using Memory = WordsMemory<T, kHeadDim>;
  const Memory memory(params, ptx::opaque(ptx::dynamic_shared_memory()));
  using Tiles = typename Memory::Tiles;
  using KeyGradients = typename Tiles::KeyGradients;
  const WordsPlace place(params, tiles);
  const int first = place.tile * Memory::kSide;
  const bool carried = memory.carries();
  const PairCopies<T, kHeadDim, Tiles, true> copies{params, memory, place.s, place.b, place.head_kv};
  float dkey[KeyGradients::kM][KeyGradients::kN][4], dvalue[KeyGradients::kM][KeyGradients::kN][4];
  set_zero(dkey);
  set_zero(dvalue);
  if (!carried) {
    copies.key(first);
    copies.value(first);
    ptx::commit_async_copies();
  }
  add_over_queries<false>(copies, backward_workspace<T, kHeadDim>(params), first, [&] { return memory.row_tiles(); },
                          carried ? place.tile : -1, dkey, dvalue);
  const Part part = memory.part.load();
  // Where P or dO is not finite, dS = P (dP - D_w) is not either: dK tells of dV, too.
  const bool again = must_be_redone(params, part, all_finite(dkey));
  const WordsPlace same(params, tiles);
  const int same_first = same.tile * Memory::kSide;
  if (!again) {
    const PairCopies<T, kHeadDim, Tiles, true> same_copies{params, memory, same.s, same.b, same.head_kv};
    store_key_gradients(same_copies, same_first, part.end, dkey, dvalue);
    if (part.begin <= same_first) return true;
  }
  memory.begin_pass(part_of_keys(params, same.s, again ? same.s.key_rows : part.begin));
  if (threadIdx.x == 0) memory.store_carries(false);
  __syncthreads();
  return false;
}

template <class T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, (kIsTuned<T, kHeadDim> ? 2 : 1))
    backward_words_kernel(const __grid_constant__ ZeroGateParams params, int tiles) {
  using Memory = WordsMemory<T, kHeadDim>;
  const Memory memory(params, ptx::dynamic_shared_memory());
  bool queries, keys;
  {
    const WordsPlace place(params, tiles);
    const Sequence& s = place.s;
    const int first = place.tile * Memory::kSide;
    queries = params.dquery.data != nullptr && first < s.rows;
    keys = params.dkey.data != nullptr && first < s.key_rows;
    Window key_tiles{0, 0};
    if (queries && first < s.queries) {
      const BackwardWorkspace workspace = backward_workspace<T, kHeadDim>(params);
      const Window* windows = workspace.windows + place.b * workspace.padded_rows + first;
      key_tiles.begin = ptx::load_global(windows).begin / Memory::kSide;
      key_tiles.end = (ptx::load_global(windows + Memory::kSide - 1).end + Memory::kSide - 1) / Memory::kSide;
    }
    const Window row_tiles = keys ? row_tiles_seeing<typename Memory::Tiles>(params, s, first) : Window{0, 0};
    // With several query heads the accumulators of dK and dV would have to wait for all of them: more than there are registers.
    const auto has_own = [&](Window range) { return place.tile >= range.begin && place.tile < range.end; };
    if (threadIdx.x == 0) {
      memory.store_plan(key_tiles, row_tiles);
      memory.store_carries(queries && keys && place.group == 1 && has_own(key_tiles) && has_own(row_tiles));
      memory.part.store(whole_part(s));
    }
    __syncthreads();
  }
#pragma unroll 1
  for (int head = 0; queries && head < params.heads_q / params.heads_kv;)
    head += queries_pass<T, kHeadDim>(params, tiles, head);
  if (!keys) return;
#pragma unroll 1
  while (!keys_pass<T, kHeadDim>(params, tiles)) {
  }
}

}  // namespace lak::sm80
