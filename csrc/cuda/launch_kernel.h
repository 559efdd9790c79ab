// Launching a kernel, the same way for every pass and architecture: grid and shared memory checked, errors as codes.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>

#include <ptx/launch.h>

#include "error_codes.h"

namespace lak {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The code of a CUDA error. What is reported here is not left behind for somebody else's next call.
inline int code_of(cudaError_t error) {
  if (error == cudaSuccess) return kLakSuccess;
  cudaGetLastError();
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction: return kLakNoCodeForDevice;
    case cudaErrorInsufficientDriver:
    case cudaErrorUnsupportedPtxVersion: return kLakDriverTooOld;
    case cudaErrorMemoryAllocation: return kLakOutOfMemory;
    default: return kLakCudaError + static_cast<int>(error);
  }
}

// Launches `blocks` blocks (none: success). Shared memory above 48 KiB has to be allowed on the current device, which is done
// on every call: there may be several devices, it takes less than a microsecond, and it is no stream operation, so it is
// permitted while a graph is captured.
template <auto kKernel, int kSharedBytes, class... Arguments>
int launch_kernel(int64_t blocks, int threads, cudaStream_t stream, const Arguments&... arguments) {
  if (blocks == 0) return kLakSuccess;
  if (blocks > std::numeric_limits<int32_t>::max()) return kLakGridTooLarge;
  if constexpr (kSharedBytes > 0) {
    const int code = code_of(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
    if (code != kLakSuccess) return code;
  }
  return code_of(ptx::launch<kKernel>(static_cast<unsigned>(blocks), threads, kSharedBytes, stream, arguments...));
}

}  // namespace lak
