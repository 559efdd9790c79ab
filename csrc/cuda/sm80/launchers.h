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

// A property of the current device; 0 where there is none.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&value, attribute, device) != cudaSuccess) return 0;
  return value;
}

// major * 10 + minor.
inline int capability() {
  return 10 * device_attribute(cudaDevAttrComputeCapabilityMajor) + device_attribute(cudaDevAttrComputeCapabilityMinor);
}

// Whether the device has so much shared memory for a block, and for two blocks on one multiprocessor (each costs 1 KiB more).
inline bool fits(int bytes) { return bytes <= device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }
inline bool fits_twice(int bytes) {
  return 2 * (bytes + 1024) <= device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
}

// Kernels that need more than every supported device has (99 KiB a block on compute capability 8.6 and 8.9) are launched where
// they fit.
template <auto kKernel, int kSharedBytes = 0, class... Arguments>
int launch(int64_t blocks, int threads, cudaStream_t stream, const Arguments&... arguments) {
  static_assert(kSharedBytes <= 163 * 1024, "compute capability 8.0 has 163 KiB of shared memory a block");
  return launch_kernel<kKernel, kSharedBytes>(blocks, threads, stream, arguments...);
}

}  // namespace lak::sm80
