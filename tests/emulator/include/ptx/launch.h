// Emulates csrc/cuda/ptx/launch.h.
#pragma once

#include "cuda_runtime.h"

namespace lak::ptx {

template <auto kKernel, class... Arguments>
cudaError_t launch(unsigned blocks, unsigned threads, unsigned shared_bytes, cudaStream_t stream,
                   const Arguments&... arguments) {
  constexpr unsigned kWithoutAsking = 48 * 1024;
  const auto& allowed = emulator::device().shared_allowed;
  const auto found = allowed.find(reinterpret_cast<const void*>(kKernel));
  if (shared_bytes > kWithoutAsking && (found == allowed.end() || static_cast<unsigned>(found->second) < shared_bytes)) {
    return cudaErrorInvalidValue;
  }
  if (blocks == 0 || blocks > 0x7fffffffu || threads == 0 || threads > 1024) return cudaErrorInvalidConfiguration;
  if (emulator::device().launches_left >= 0 && emulator::device().launches_left-- == 0) return cudaErrorMemoryAllocation;
  emulator::device().launched_on = emulator::device().current;
  emulator::device().launched_with = stream;
  emulator::run({__PRETTY_FUNCTION__, {blocks, 1, 1}, {threads, 1, 1}, shared_bytes, [&] { kKernel(arguments...); }});
  return cudaSuccess;
}

}  // namespace lak::ptx
