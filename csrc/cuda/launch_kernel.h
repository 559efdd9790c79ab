// What the instantiations provide to interface.cu, one template per kernel family, and what they share with it.
#pragma once

#include <cuda_runtime.h>

#include <limits>

#include "elements.h"
#include "interface.h"
#include "zero_gate_params.h"

namespace lak {

// Launchers for one element type and padded head size; explicitly instantiated under instantiate/.
template <class T, int kHeadDim>
int launch_forward(const ZeroGateParams& params, cudaStream_t stream);
template <class T, int kHeadDim>
int launch_backward(const ZeroGateParams& params, cudaStream_t stream);
template <class T, int kHeadDim>
int launch_decode(const ZeroGateParams& params, cudaStream_t stream);

inline bool needs_elementwise_scores(const ZeroGateParams& p) { return p.mask.type != MaskType::kNone || !(p.scale > 0.0); }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A one-dimensional grid; false when it is larger than the hardware takes.
inline bool grid_fits(int64_t blocks) { return blocks <= std::numeric_limits<int32_t>::max(); }

// The code of a CUDA error; it is reported by that, not left behind for somebody else's next call.
inline int code_of(cudaError_t error) {
  if (error == cudaSuccess) return kLakSuccess;
  cudaGetLastError();
  const bool no_code = error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction;
  return no_code ? kLakNoCodeForDevice : kLakCudaError + static_cast<int>(error);
}

// Allows a kernel more than 48 KiB of shared memory on the current device (on every call: there may be several devices, and
// it takes less than a microsecond). Not a stream operation: allowed while a graph is captured.
template <class Kernel>
int allow_shared_memory(Kernel kernel, int bytes) {
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaErrorInvalidValue) return code_of(error);
  cudaGetLastError();
  return kLakTooMuchSharedMemory;
}

}  // namespace lak
