// Named barriers (bar.sync), for kernels whose warps have different tasks.
#pragma once

#include "cuda_runtime.h"

namespace lak::ptx {

// Waits until `threads` threads of the block, a multiple of 32, have come to barrier `id`, 1 to 15 (0 is __syncthreads).
inline void named_barrier(unsigned id, unsigned threads, emulator::Where where = emulator::Where::current()) {
  emulator::active_block().barrier(id, threads, where);
}

}  // namespace lak::ptx
