#pragma once

#include <ptx/launch.h>

#include "launchers.h"
#include "sm80/decode/combine.h"

namespace lak {

// Rows of the group's heads and the new queries together, in tiles of 16.
inline int64_t decode_row_tiles(const ZeroGateParams& p) { return ceil_div(p.seq_q * (p.heads_q / p.heads_kv), kDecodeRows); }

// As many splits as fill the device about twice, none of them shorter than 256 keys of the cache's memory.
inline int64_t decode_splits(const ZeroGateParams& p) {
  int device = 0, multiprocessors = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
    multiprocessors = 1;
  }
  const int64_t tiles = p.batch * p.heads_kv * decode_row_tiles(p);
  const int64_t wanted = ceil_div(2 * multiprocessors, tiles > 0 ? tiles : 1), most = ceil_div(p.seq_k, 256);
  return wanted < 1 || most < 1 ? 1 : wanted < most ? wanted : most;
}

template <class T, int kHeadDim>
int launch_decode(const ZeroGateParams& p, cudaStream_t stream) {
  const int64_t row_tiles = decode_row_tiles(p), splits = decode_splits(p);
  const int64_t blocks = p.batch * p.heads_kv * row_tiles * splits;
  const int64_t rows = p.batch * p.heads_q * p.seq_q;
  if (rows == 0) return kLakSuccess;
  if (p.workspace == nullptr) return kLakNoWorkspace;
  if (!grid_fits(blocks) || !grid_fits(rows)) return kLakGridTooLarge;
  constexpr auto kDecode = decode_kernel<T, kHeadDim>;
  constexpr auto kCombine = combine_kernel<T, kHeadDim>;
  constexpr int kBytes = DecodeMemory<T, kHeadDim>::kBytes;
  static_assert(kBytes <= 99 * 1024, "compute capability 8.6 has 99 KiB of shared memory a block");
  constexpr int kThreadsHere = 32 * kDecodeWarps<T, kHeadDim>;
  const int allowed = allow_shared_memory(kDecode, kBytes);
  if (allowed != kLakSuccess) return allowed;
  const int s = static_cast<int>(splits), t = static_cast<int>(row_tiles);
  if (const int code = code_of(ptx::launch<kDecode>(blocks, kThreadsHere, kBytes, stream, p, s, t)); code != kLakSuccess) {
    return code;
  }
  return code_of(ptx::launch<kCombine>(ceil_div(rows, kWarps), kThreads, 0, stream, p, s, t));
}

}  // namespace lak
