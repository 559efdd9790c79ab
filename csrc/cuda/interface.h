// The CUDA kernels' plain C interface: everything the op layer, and the emulator's test module, may call.
//
// Every function that returns an int returns a LakCudaError, which lak_cuda_error explains. Nothing here waits for the device, and nothing but kernel
// launches happens on the stream, so that calls may be captured into a CUDA graph.
#pragma once

#include <cstdint>

#include "error_codes.h"
#include "zero_gate_params.h"

#define LAK_EXPORT __attribute__((visibility("default")))

extern "C" {

LAK_EXPORT const char* lak_cuda_error(int code);

LAK_EXPORT int lak_cuda_forward(const lak::ZeroGateParams* params, void* stream);
LAK_EXPORT int lak_cuda_backward(const lak::ZeroGateParams* params, void* stream);
LAK_EXPORT int lak_cuda_decode(const lak::ZeroGateParams* params, void* stream);

// Can the kernels run on the current device? Loads a kernel's code there, and so creates the device's context. `can_change` is set
// to 1 where a later call may be answered otherwise (memory, a device in use by another process), else to 0.
LAK_EXPORT int lak_cuda_probe(int* can_change);

// From now on forward takes tiles of `keys` keys on devices of a compute capability (major * 10 + minor), for all threads. Two sizes
// are compiled for 16 bits and head_dim 65 to 128: 64 and 32. 0: whichever the kernels take without this call.
LAK_EXPORT int lak_cuda_choose_forward_keys(int capability, int keys);

// What is compiled, one line a kernel: architecture family, name, element type, padded head_dim, rows and keys of a tile, threads
// of a block, blocks that a multiprocessor is meant to hold, dynamic shared memory of a block in bytes.
LAK_EXPORT const char* lak_cuda_kernels();

// The compute capabilities with machine code of their own, separated by spaces, such as "80 90".
LAK_EXPORT const char* lak_cuda_architectures();

// The oldest driver that serves, as a phrase.
LAK_EXPORT const char* lak_cuda_driver_needed();

// Bytes of params.workspace.
LAK_EXPORT int64_t lak_cuda_backward_workspace(const lak::ZeroGateParams* params);
LAK_EXPORT int64_t lak_cuda_decode_workspace(const lak::ZeroGateParams* params);
}
