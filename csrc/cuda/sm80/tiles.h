// The one table of tile sizes. Head sizes are padded to 64, 128 or 256 with zeros that no global memory is read for.
// 64 and 128 in 16 bits are tuned; float32 and 256 are made to be correct in little code and shared memory.
//
// Shared memory stays below 99 KiB a block (compute capability 8.6 and 8.9 have no more), and below 81 KiB for the tuned
// ones, so that two blocks share a multiprocessor of compute capability 8.0 (164 KiB), as 128 threads at up to 255
// registers allow as well.
#pragma once

#include <cstdint>
#include <type_traits>

namespace lak::sm80 {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kPrefixTile = 16;  // slots of one matrix step

template <class T>
constexpr bool kIsHalf = !std::is_same_v<T, float>;
template <class T, int kHeadDim>
constexpr bool kIsTuned = kIsHalf<T> && kHeadDim <= 128;

// The forward kernels. kElementwise is for masks and scales that are not positive, and the only one of what is not tuned. kSmall is
// for cards with 100 KiB of shared memory a multiprocessor (compute capability 8.6 and 8.9), where two of its blocks fit.
enum class ForwardKind { kPlain, kSmall, kElementwise };

// kRowTiles: 16-row matrix tiles of each warp. 32 rows a warp halve the shared-memory traffic per matrix instruction; the
// element-wise path needs registers for addresses and takes 16.
// kKeys: with 128 columns, 32 rows a warp and 64 keys 254 registers are taken. 32 keys would leave some free, but cost twice
// the barriers, and the fragments of Q would be read twice as often.
template <class T, int kHeadDim, ForwardKind kKind>
struct ForwardTiles {
  static constexpr bool kTuned = kIsTuned<T, kHeadDim>;
  static_assert(kTuned || kKind == ForwardKind::kElementwise);
  static_assert(kKind != ForwardKind::kSmall || kHeadDim == 128, "of 64 columns two blocks fit everywhere");
  static constexpr int kRowTiles = kKind != ForwardKind::kElementwise ? 2 : 1;
  static constexpr int kRows = kWarps * 16 * kRowTiles;
  static constexpr int kKeys = !kTuned ? 16 : kKind == ForwardKind::kSmall ? 32 : 64;
  // Whether the prefix has shared memory of its own. Else it takes the place of the last keys, which costs a wait.
  static constexpr bool kPrefixApart = kTuned && kKind != ForwardKind::kSmall;
};

// Backward, row by row: kRows queries at a time, 16 a warp (float32 with 256 columns: one warp, the others help with the sums).
template <class T, int kHeadDim>
struct RowTiles {
  static constexpr int kRows = !kIsHalf<T> && kHeadDim == 256 ? 16 : 16 * kWarps;
  static constexpr int kStages = kIsTuned<T, kHeadDim> ? 2 : 1;
  static constexpr int kMostTilesOfBlock = 1024 / kRows;  // a block sums the prefix's gradients over so many
};

// kAcross of kWarpsOfBlock warps beside each other, kDown below each other, share a product of kRows x kColumns.
template <int kRows, int kColumns, int kWarpsOfBlock, int kDown_, int kAcross_>
struct WarpGrid {
  static constexpr int kDown = kDown_, kAcross = kAcross_;
  static constexpr int kM = kRows / kDown / 16, kN = kColumns / kAcross / 8;  // fragments of a warp
  static_assert(kM >= 1 && kN >= 2 && kN % 2 == 0);
  static __device__ __forceinline__ bool has(int warp) { return kDown * kAcross == kWarpsOfBlock || warp < kDown * kAcross; }
  static __device__ __forceinline__ int row(int warp) { return warp / kAcross * 16 * kM; }
  static __device__ __forceinline__ int column(int warp) { return warp % kAcross * 8 * kN; }
};

// Backward of the words, pairs of kRows queries and kKeys keys. Four products of a pair read both of their operands from shared
// memory, and that is what limits them: on compute capability 8.0 an HMMA takes two cycles of a multiprocessor and an LDSM four,
// so that warps have to be laid out for fewer than one LDSM for two HMMAs. With 32 x 32 scores a warp, and 32 keys or queries by
// 64 columns of a gradient, they are 0.43.
template <class T, int kHeadDim, int kWarpsOfBlock>
struct WordTiles {
  static constexpr int kWarps = kWarpsOfBlock, kThreads = 32 * kWarps;
  static constexpr bool kTuned = kIsTuned<T, kHeadDim>, kWide = kWarps == 8;
  static_assert(kWarps == 4 || (kTuned && kWide));
  static constexpr int kKeys = kWide ? 128 : kTuned ? 64 : kIsHalf<T> || kHeadDim <= 128 ? 32 : 16;
  static constexpr int kRows = kWide && kHeadDim == 128 ? 64 : kKeys;
  static constexpr int kLongDown = kHeadDim == 256 ? 1 : kWide ? 4 : 2;  // gradients of 256 columns: every warp has all rows
  using Scores = WarpGrid<kRows, kKeys, kWarps,
                          kKeys == 16    ? 1
                          : kRows == 128 ? 4
                                         : 2,
                          kKeys == 16    ? 1
                          : kRows == 128 ? 2
                                         : kWarps / 2>;
  using KeyGradients = WarpGrid<kKeys, kHeadDim, kWarps, kLongDown, kWarps / kLongDown>;
  static constexpr int kRowsDown = kHeadDim == 256 ? 1 : kRows == 128 ? 4 : 2;
  using QueryGradients = WarpGrid<kRows, kHeadDim, kWarps, kRowsDown, kWarps / kRowsDown>;
};

// Each warp of decode streams its own keys, 16 at a time, in a pipeline of this depth.
template <class T, int kHeadDim>
constexpr int kDecodeStages = kIsTuned<T, kHeadDim> ? 2 : 1;
template <class T, int kHeadDim>
constexpr int kDecodeWarps = !kIsHalf<T> && kHeadDim == 256 ? 2 : 4;

}  // namespace lak::sm80
