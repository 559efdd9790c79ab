// What the instantiations provide, one template for each pass, and how they launch.
#pragma once

#include "elements.h"
#include "launch_kernel.h"
#include "zero_gate_params.h"

namespace lak::sm80 {

// For one element type and padded head size; explicitly instantiated in instantiate/.
template <class T, int kHeadDim>
int launch_forward(const ZeroGateParams& params, cudaStream_t stream);
template <class T, int kHeadDim>
int launch_backward(const ZeroGateParams& params, cudaStream_t stream);
template <class T, int kHeadDim>
int launch_decode(const ZeroGateParams& params, cudaStream_t stream);

template <auto kKernel, int kSharedBytes = 0, class... Arguments>
int launch(int64_t blocks, int threads, cudaStream_t stream, const Arguments&... arguments) {
  static_assert(kSharedBytes <= 99 * 1024, "compute capability 8.6 and 8.9 have 99 KiB of shared memory a block");
  return launch_kernel<kKernel, kSharedBytes>(blocks, threads, stream, arguments...);
}

}  // namespace lak::sm80
