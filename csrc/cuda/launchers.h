// What the instantiations provide to launch.cu, one template per kernel family, and what they share with it.
#pragma once

#include <cuda_runtime.h>

#include <limits>

#include "elements.h"
#include "launch.h"
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

// Allows a kernel more than 48 KiB of shared memory. Not a stream operation: allowed while a graph is captured.
template <class Kernel>
int allow_shared_memory(Kernel kernel, int bytes) {
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaErrorNoKernelImageForDevice) return kLakNoCodeForDevice;
  if (error != cudaSuccess) {
    cudaGetLastError();  // is reported by the code, not left for somebody else's next call
    return kLakTooMuchSharedMemory;
  }
  return kLakSuccess;
}

inline int launch_result(cudaError_t error) {
  if (error == cudaErrorNoKernelImageForDevice) return kLakNoCodeForDevice;
  return error == cudaSuccess ? kLakSuccess : kLakLaunchFailed;
}

}  // namespace lak
