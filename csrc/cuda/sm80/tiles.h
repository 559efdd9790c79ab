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

// kRowTiles: 16-row matrix tiles of each warp. 32 rows a warp halve the shared-memory traffic per matrix instruction.
// With 128 columns and 32 rows a warp the output alone takes 128 registers: from 48 keys on ptxas 13.0 spills some.
// The element-wise path (masks) needs registers for addresses and takes 16 rows a warp.
template <class T, int kHeadDim, bool kElementwise>
struct ForwardTiles {
  static constexpr int kRowTiles = kIsTuned<T, kHeadDim> && !kElementwise ? 2 : 1;
  static constexpr int kRows = kWarps * 16 * kRowTiles;
  static constexpr int kKeys = kIsTuned<T, kHeadDim> ? (kHeadDim == 64 ? 64 : 32) : 16;
};

// Backward. Warps of a block: float32 with 256 columns has room for two only.
template <class T, int kHeadDim>
constexpr int kBackwardWarps = !kIsHalf<T> && kHeadDim == 256 ? 2 : 4;

// Owner of keys (dK, dV): each warp holds dK and dV of its 16 keys in registers, kHeadDim of them a thread. The tuned ones
// take the next queries while they compute (two stages).
template <class T, int kHeadDim>
struct KeyGradientTiles {
  static constexpr int kKeys = kBackwardWarps<T, kHeadDim> * 16;
  static constexpr int kRows = kIsTuned<T, kHeadDim> ? (kHeadDim == 64 ? 64 : 32) : 16;
  static constexpr int kStages = kIsTuned<T, kHeadDim> ? 2 : 1;
};

// Owner of queries (dQ where it must be deterministic, or is asked for alone).
template <class T, int kHeadDim>
struct QueryGradientTiles {
  static constexpr int kRows = kBackwardWarps<T, kHeadDim> * 16;
  static constexpr int kKeys = kIsTuned<T, kHeadDim> ? 32 : 16;
  static constexpr int kStages = kIsTuned<T, kHeadDim> ? 2 : 1;
};

// Each warp of decode streams its own keys, 16 at a time, in a pipeline of this depth.
template <class T, int kHeadDim>
constexpr int kDecodeStages = kIsTuned<T, kHeadDim> ? 2 : 1;
template <class T, int kHeadDim>
constexpr int kDecodeWarps = !kIsHalf<T> && kHeadDim == 256 ? 2 : 4;

}  // namespace lak::sm80
