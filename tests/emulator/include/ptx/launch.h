// Emulates csrc/cuda/ptx/launch.h.
#pragma once

#include "cuda_runtime.h"

namespace lak::ptx {

template <auto kKernel, class... Arguments>
cudaError_t launch(unsigned blocks, unsigned threads, unsigned shared_bytes, cudaStream_t stream,
                   const Arguments&... arguments) {
  emulator::device().launched_on = emulator::device().current;
  emulator::device().launched_with = stream;
  emulator::run({__PRETTY_FUNCTION__, {blocks, 1, 1}, {threads, 1, 1}, shared_bytes, [&] { kKernel(arguments...); }});
  return cudaSuccess;
}

}  // namespace lak::ptx
