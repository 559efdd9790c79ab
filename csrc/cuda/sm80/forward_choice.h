// Which tiles forward takes where two are compiled: 16 bits, head_dim 65 to 128 (ForwardKind in tiles.h).
#pragma once

#include <atomic>

namespace lak::sm80 {

// By compute capability (major * 10 + minor): 64 or 32 keys, as somebody has chosen (lak_cuda_choose_forward_keys), else 0.
inline constexpr int kCapabilities = 256;
inline std::atomic<int> forward_keys[kCapabilities];

// `fits`: whether two blocks of 64 keys fit a multiprocessor. Then they are the default: half of the barriers of 32 keys for each
// product, and each fragment of Q read half as often, at no spilled register. Else a block of 32 keys hides the other's waits.
inline bool takes_small_tiles(int capability, bool fits) {
  const int keys = capability < kCapabilities ? forward_keys[capability].load(std::memory_order_relaxed) : 0;
  return keys == 0 ? !fits : keys == 32;
}

}  // namespace lak::sm80
