// Where backward keeps what its kernels hand to one another.
//
// Statistics of the rows have the order [sequences, heads_q, padded rows]; padded to whole tiles, so that a tile of them is
// aligned and may be read without asking where the sequence ends.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "problem.h"
#include "sm80/scores.h"
#include "sm80/tiles.h"

namespace lak::sm80 {

// Prefixes of more than 16 slots take several tiles of slots.
__host__ __device__ inline int prefix_tiles(const ZeroGateParams& params) {
  return params.prefix_count == 0 ? 0 : static_cast<int>((params.prefix_length + kPrefixTile - 1) / kPrefixTile);
}
__host__ __device__ inline bool has_shared_prefix(const ZeroGateParams& params) {
  return params.prefix_index == nullptr && params.prefix_count <= 1;
}

// Columns of dS of the prefix in memory: not all 16 of a tile of slots, but as many as pieces of four (kDscorePiece) need. Of 10 slots
// 12, and so an eighth of N less to write and to read at head_dim 64.
constexpr int kDscorePiece = 4;
__host__ __device__ inline int64_t dscore_slots_of(const ZeroGateParams& params) {
  return params.prefix_count == 0 ? 0 : (params.prefix_length + kDscorePiece - 1) / kDscorePiece * kDscorePiece;
}

// How the rows kernel is cut: a block takes tiles of rows of one head that follow each other, and leaves one partial sum of the
// prefix's gradients for all of them. A shared prefix lets it go on from sequence to sequence. 256 blocks or a thousand rows a
// block, whichever are more blocks.
struct RowGrid {
  int tiles;         // of rows, of a sequence
  int tiles_a_block;
  int chunks;        // blocks of one head (shared prefix: of all sequences)
  int outer;         // sequences that have blocks of their own

  __host__ __device__ RowGrid(const ZeroGateParams& params, int64_t padded_rows, int rows_of_tile, int most_tiles) {
    const Extent extent = extent_of(params);
    tiles = static_cast<int>(padded_rows / rows_of_tile);
    const int64_t all = has_shared_prefix(params) ? tiles * extent.sequences : tiles;
    outer = static_cast<int>(has_shared_prefix(params) ? 1 : extent.sequences);
    const int64_t wanted = (tiles * extent.sequences * params.heads_q + 255) / 256;
    tiles_a_block = static_cast<int>(wanted < 1 ? 1 : wanted < most_tiles ? wanted : most_tiles);
    chunks = static_cast<int>((all + tiles_a_block - 1) / tiles_a_block);
  }
};

constexpr int kWindowsOfBlock = 6;

struct BackwardWorkspace {
  Window* parts;        // first of all: [blocks of words.h, kWindowsOfBlock], see BlockPart
  float* shift;         // [rows] log-sum-exp of the words in units of the scores, see word_probability()
  float* rest;          // [rows] what the shift loses, float32 only
  float* delta;         // [rows] D_w
  float* prefix_shift;  // [rows] the same three of the prefix, where it has more than one tile of slots
  float* prefix_rest;
  float* prefix_delta;
  Window* windows;   // [sequences, padded rows]; of rows past the last: none, at the end of the last one's
  void* dscores;     // [rows, dscore_slots] of T: gate P_p (dO Vp^T - D_p), 0 where there is no slot or row
  float* dquery;     // sums of the words' part of dQ / scale, where several blocks add to it, see dquery_fragment()
  float* dgate;      // [outer, heads_q, chunks]
  float* dprefix;    // [outer, heads_q, chunks, 2 (K, V), P, head_dim]
  int64_t padded_rows, heads, head_dim, dscore_slots, bytes;
  RowGrid grid;

  // With a null base the pointers mean nothing, but `bytes` does.
  __host__ __device__ BackwardWorkspace(const ZeroGateParams& params, int row_padding, int rows_of_tile, int most_tiles,
                                        int word_tile, int element, bool adds_dquery)
      : padded_rows((extent_of(params).rows + row_padding - 1) / row_padding * row_padding), heads(params.heads_q),
        head_dim(params.head_dim), dscore_slots(dscore_slots_of(params)), grid(params, padded_rows, rows_of_tile, most_tiles) {
    char* next = static_cast<char*>(params.workspace);
    int64_t used = 0;
    const auto take = [&](int64_t count, int64_t size) {
      char* piece = next + used;
      used += (count * size + 15) / 16 * 16;
      return piece;
    };
    const auto floats = [&](int64_t count) { return reinterpret_cast<float*>(take(count, 4)); };
    const Extent extent = extent_of(params);
    const int64_t rows = extent.sequences * heads * padded_rows;
    const int64_t partial_sums = params.dgate == nullptr ? 0 : grid.outer * heads * grid.chunks;
    const bool words = params.dquery.data != nullptr || params.dkey.data != nullptr;
    const int64_t tiles = prefix_tiles(params);
    const int64_t most = extent.rows > extent.keys ? extent.rows : extent.keys;
    const int64_t word_blocks = (most + word_tile - 1) / word_tile * params.heads_kv * extent.sequences;
    parts = reinterpret_cast<Window*>(take(words && !adds_dquery ? word_blocks * kWindowsOfBlock : 0, sizeof(Window)));
    shift = floats(words ? rows : 0);
    rest = floats(words && element == 4 ? rows : 0);
    delta = floats(words ? rows : 0);
    prefix_shift = floats(tiles > 1 ? rows : 0);
    prefix_rest = floats(tiles > 1 ? rows : 0);
    prefix_delta = floats(tiles > 1 ? rows : 0);
    windows = reinterpret_cast<Window*>(take(words ? extent.sequences * padded_rows : 0, sizeof(Window)));
    dscores = take(params.dquery.data != nullptr ? rows * dscore_slots : 0, element);
    dquery = floats(adds_dquery ? rows * head_dim : 0);
    dgate = floats(partial_sums);
    dprefix = floats(partial_sums * 2 * params.prefix_length * head_dim);
    bytes = used > 0 ? used : 16;  // never none, so that a workspace that is missing is always an error
  }

  // Position of row 0 of a sequence in the statistics.
  __host__ __device__ int64_t row_of(int64_t b, int64_t head) const { return (b * heads + head) * padded_rows; }

  // The 128 sums of 16 rows and 8 columns, in the order of accumulators: element e of lane l at 32 e + l, so that the
  // reductions of a warp fill whole sectors.
  __device__ float* dquery_fragment(int64_t b, int64_t head, int row, int column) const {
    return dquery + (row_of(b, head) + row) * head_dim + column * 16;
  }
};

// Of long sequences several blocks share the keys of a query where they may, and add dQ with atomics, which costs memory traffic
// but no product twice. Else every block computes the scores of its queries and those of its keys (backward/words.h).
template <class T, int kHeadDim>
__host__ __device__ bool adds_dquery(const ZeroGateParams& params) {
  return kIsTuned<T, kHeadDim> && params.deterministic == 0 && params.dquery.data != nullptr && params.dkey.data != nullptr &&
         params.seq_k > kLongSequence && !is_token_tiled(params) && !needs_elementwise_scores(params);
}

template <class T, int kHeadDim>
__host__ __device__ BackwardWorkspace backward_workspace(const ZeroGateParams& params) {
  using Tiles = RowTiles<T, kHeadDim>;
  const bool adds = adds_dquery<T, kHeadDim>(params);
  return BackwardWorkspace(params, adds ? 128 : 64, Tiles::kRows, Tiles::kMostTilesOfBlock,
                           WordTiles<T, kHeadDim, kWarps>::kRows, sizeof(T), adds);
}

}  // namespace lak::sm80
