// The CUDA kernels' plain C interface: everything the op layer, and the emulator's test module, may call.
//
// Every function returns 0 or a code that lak_cuda_error explains. Nothing here waits for the device, and nothing but kernel
// launches happens on the stream, so that calls may be captured into a CUDA graph.
#pragma once

#include <cstdint>

#include "zero_gate_params.h"

#define LAK_EXPORT __attribute__((visibility("default")))

extern "C" {

enum LakCudaError : int {
  kLakSuccess = 0,
  kLakBadDtype,
  kLakBadHeadDim,
  kLakMisaligned,
  kLakBadSize,
  kLakGridTooLarge,
  kLakNoCodeForDevice,
  kLakTooMuchSharedMemory,
  kLakNoWorkspace,
  kLakCudaError = 1000,  // plus a cudaError_t
};

LAK_EXPORT const char* lak_cuda_error(int code);

LAK_EXPORT int lak_cuda_forward(const lak::ZeroGateParams* params, void* stream);
LAK_EXPORT int lak_cuda_backward(const lak::ZeroGateParams* params, void* stream);
LAK_EXPORT int lak_cuda_decode(const lak::ZeroGateParams* params, void* stream);

// What is compiled, one line a kernel: name, element type, padded head_dim, rows and keys of a tile, threads a block, blocks a
// multiprocessor shall hold, dynamic shared memory of a block in bytes.
LAK_EXPORT const char* lak_cuda_kernels();

// The architectures that are compiled, separated by spaces.
LAK_EXPORT const char* lak_cuda_architectures();

// Bytes of params.workspace.
LAK_EXPORT int64_t lak_cuda_backward_workspace(const lak::ZeroGateParams* params);
LAK_EXPORT int64_t lak_cuda_decode_workspace(const lak::ZeroGateParams* params);
}
