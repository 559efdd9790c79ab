#pragma once

#include "sm80/decode/combine.h"
#include "sm80/decode/workspace.h"
#include "sm80/launchers.h"

namespace lak::sm80 {

template <class T, int kHeadDim>
int launch_decode(const ZeroGateParams& params, cudaStream_t stream) {
  const DecodeSplits grid(params);
  const int64_t rows = params.batch * params.heads_q * params.seq_q;
  if (rows == 0) return kLakSuccess;
  if (params.workspace == nullptr) return kLakNoWorkspace;
  const int splits = static_cast<int>(grid.splits), row_tiles = static_cast<int>(grid.row_tiles);
  const int code = launch<decode_kernel<T, kHeadDim>, DecodeMemory<T, kHeadDim>::kBytes>(
      grid.blocks(params), 32 * kDecodeWarps<T, kHeadDim>, stream, params, splits, row_tiles);
  if (code != kLakSuccess || splits == 1) return code;
  return launch<combine_kernel<T, kHeadDim>>(ceil_div(rows, kWarps), kThreads, stream, params, splits, row_tiles);
}

} // namespace lak::sm80
