// The only place with the launch syntax, which a plain C++ compiler does not know.
#pragma once

#include <cuda_runtime.h>

namespace lak::ptx {

template <auto kKernel, class... Arguments>
cudaError_t launch(unsigned blocks, unsigned threads, unsigned shared_bytes, cudaStream_t stream,
                   const Arguments&... arguments) {
  kKernel<<<blocks, threads, shared_bytes, stream>>>(arguments...);
  return cudaGetLastError();
}

}  // namespace lak::ptx
