// The order of backward's kernels. Only what is asked for is computed: without gradients of Q, K and V nothing quadratic runs.
#pragma once

#include "sm80/backward/keys.h"
#include "sm80/backward/rows.h"
#include "sm80/backward/sums.h"
#include "sm80/backward/words.h"
#include "sm80/launchers.h"
#include "sm80/zero_tail.h"

namespace lak::sm80 {

template <class T, int kHeadDim, int kWarpsOfBlock>
int launch_backward_keys(const ZeroGateParams& params, cudaStream_t stream) {
  using Tiles = WordTiles<T, kHeadDim, kWarpsOfBlock>;
  const Extent extent = extent_of(params);
  const int64_t tiles = ceil_div(extent.keys, Tiles::kKeys);
  return launch<backward_keys_kernel<T, kHeadDim, kWarpsOfBlock>, PairMemory<T, kHeadDim, Tiles>::kBytes>(
      tiles * params.heads_kv * extent.sequences, Tiles::kThreads, stream, params, static_cast<int>(tiles));
}

// dK, dV and dQ with sums across blocks.
template <class T, int kHeadDim>
int launch_summed_words(const ZeroGateParams& params, cudaStream_t stream) {
  using Wide = PairMemory<T, kHeadDim, WordTiles<T, kHeadDim, 8>>;
  const int code = fits(Wide::kBytes) ? launch_backward_keys<T, kHeadDim, 8>(params, stream)
                                      : launch_backward_keys<T, kHeadDim, kWarps>(params, stream);
  if (code != kLakSuccess) return code;
  const Extent extent = extent_of(params);
  const int64_t row_tiles = ceil_div(extent.rows, 16 * kWarps);
  return launch<convert_dquery_kernel<T, kHeadDim>, kPrefixTile * kHeadDim* static_cast<int>(sizeof(T))>(
      row_tiles * params.heads_q * extent.sequences, kThreads, stream, params, static_cast<int>(row_tiles));
}

template <class T, int kHeadDim>
int launch_words(const ZeroGateParams& params, cudaStream_t stream) {
  using Tiles = WordTiles<T, kHeadDim, kWarps>;
  const Extent extent = extent_of(params);
  const int64_t rows = params.dquery.data == nullptr ? 0 : extent.rows, keys = params.dkey.data == nullptr ? 0 : extent.keys;
  const int64_t tiles = ceil_div(rows > keys ? rows : keys, Tiles::kRows);
  return launch<backward_words_kernel<T, kHeadDim>, WordsMemory<T, kHeadDim>::kBytes>(
      tiles * params.heads_kv * extent.sequences, kThreads, stream, params, static_cast<int>(tiles));
}

template <class T, int kHeadDim>
int launch_backward(const ZeroGateParams& params, cudaStream_t stream) {
  const BackwardWorkspace workspace = backward_workspace<T, kHeadDim>(params);
  if (params.workspace == nullptr) return kLakNoWorkspace;
  if (params.dquery.data == nullptr && params.dkey.data == nullptr && params.dgate == nullptr) return kLakSuccess;
  const int64_t row_blocks = static_cast<int64_t>(workspace.grid.chunks) * params.heads_q * workspace.grid.outer;
  const int slot_tiles = prefix_tiles(params);
  for (int tile = 0; tile < (slot_tiles > 1 ? slot_tiles : 1); ++tile) {
    const int code =
        launch<backward_rows_kernel<T, kHeadDim>, RowMemory<T, kHeadDim>::kBytes>(row_blocks, kThreads, stream, params, tile);
    if (code != kLakSuccess) return code;
  }
  if (params.dgate != nullptr) {
    const int64_t sums = params.prefix_count * (params.heads_kv * params.prefix_length * params.head_dim + params.heads_q);
    const int code = launch<backward_sums_kernel<T, kHeadDim>>(ceil_div(sums, kThreads), kThreads, stream, params);
    if (code != kLakSuccess) return code;
  }
  if (params.dquery.data == nullptr && params.dkey.data == nullptr) return kLakSuccess;
  int code = kLakSuccess;
  if constexpr (kIsTuned<T, kHeadDim>) {
    code = adds_dquery<T, kHeadDim>(params) ? launch_summed_words<T, kHeadDim>(params, stream)
                                            : launch_words<T, kHeadDim>(params, stream);
  } else {
    code = launch_words<T, kHeadDim>(params, stream);
  }
  return code == kLakSuccess ? zero_tail<T>(params, true, stream) : code;
}

}  // namespace lak::sm80
