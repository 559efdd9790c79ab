// Stands in for the CUDA toolkit's header when g++ compiles .cu files: the language's keywords and built-ins, executed by
// the machine in machine.h. PTX instructions are in ptx/ beside this file.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>

#include "machine.h"

#define LAK_EMULATOR 1

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

#define threadIdx (::emulator::active_block().thread().index)
#define blockIdx (::emulator::active_block().index())
#define blockDim (::emulator::active_block().launch().block)
#define gridDim (::emulator::active_block().launch().grid)

struct alignas(8) int2 {
  int x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline void __syncthreads(emulator::Where where = emulator::Where::current()) {
  auto& block = emulator::active_block();
  const auto& size = block.launch().block;
  block.barrier(0, size.x * size.y * size.z, where);
}

inline int __syncthreads_or(int predicate, emulator::Where where = emulator::Where::current()) {
  auto& block = emulator::active_block();
  const auto& size = block.launch().block;
  return block.barrier_or(size.x * size.y * size.z, predicate != 0, where);
}

inline void __syncwarp(unsigned mask = 0xffffffffu, emulator::Where where = emulator::Where::current()) {
  emulator::active_block().warp_sync(mask, where);
}

namespace emulator {

// A shuffle: every lane brings a value and the lane it wants to read.
template <class T>
struct Shuffle {
  T value;
  unsigned source;
  T result;
};

template <class T>
T shuffle(const char* name, unsigned mask, T value, unsigned source, Where where) {
  Shuffle<T> mine{value, source, value};
  active_block().collective(name, mask, &mine, [](void** lanes) {
    for (unsigned lane = 0; lane < 32; ++lane) {
      auto* to = static_cast<Shuffle<T>*>(lanes[lane]);
      if (to == nullptr || to->source > 31) continue;
      const auto* from = static_cast<Shuffle<T>*>(lanes[to->source]);
      if (from == nullptr) active_block().fail("shuffle from a lane outside of the mask", Where::current());
      to->result = from->value;
    }
  }, where);
  return mine.result;
}

struct Vote {
  bool predicate;
  unsigned result;
};

inline unsigned ballot(const char* name, unsigned mask, bool predicate, Where where) {
  Vote mine{predicate, 0};
  active_block().collective(name, mask, &mine, [](void** lanes) {
    unsigned result = 0;
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (lanes[lane] != nullptr && static_cast<Vote*>(lanes[lane])->predicate) result |= 1u << lane;
    }
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (lanes[lane] != nullptr) static_cast<Vote*>(lanes[lane])->result = result;
    }
  }, where);
  return mine.result;
}

}  // namespace emulator

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int = 32, emulator::Where where = emulator::Where::current()) {
  return emulator::shuffle("__shfl_sync", mask, value, lane % 32, where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int = 32, emulator::Where where = emulator::Where::current()) {
  return emulator::shuffle("__shfl_xor_sync", mask, value, emulator::active_block().thread().lane ^ lanes, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int lanes, int = 32, emulator::Where where = emulator::Where::current()) {
  return emulator::shuffle("__shfl_down_sync", mask, value, emulator::active_block().thread().lane + lanes, where);
}
inline unsigned __ballot_sync(unsigned mask, bool predicate, emulator::Where where = emulator::Where::current()) {
  return emulator::ballot("__ballot_sync", mask, predicate, where);
}
inline bool __any_sync(unsigned mask, bool predicate, emulator::Where where = emulator::Where::current()) {
  return emulator::ballot("__any_sync", mask, predicate, where) != 0;
}
inline bool __all_sync(unsigned mask, bool predicate, emulator::Where where = emulator::Where::current()) {
  return emulator::ballot("__all_sync", mask, predicate, where) == mask;
}

// ---- the host's side: an emulated device with two multiprocessors; tests may say what it is and how it fails ----
#define CUDART_VERSION 13000
using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoDevice = 100,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorUnsupportedPtxVersion = 222
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
namespace emulator {
struct Device {
  int capability = 90;                     // major * 10 + minor
  cudaError_t driver_error = cudaSuccess;  // of every call: no driver, one that is too old
  cudaError_t code_error = cudaSuccess;    // of loading a kernel
  int of_tensors = 0;                      // what the ops find as the number of their tensors' device
  const char* torch_problem = nullptr;     // why torch gives no stream
  int launches_left = -1;                  // then one fails, and those after it work; -1: none fails
  int current = 0;
  int launched_on = -1;  // the current device and the stream of the last launch
  cudaStream_t launched_with = nullptr;
  std::map<const void*, int> shared_allowed;  // of kernels: the dynamic shared memory that was asked for
};
Device& device();
inline int shared_memory_of_multiprocessor() {
  const int capability = device().capability;
  return (capability == 86 || capability == 89 ? 100 : capability < 90 ? 164 : 228) * 1024;
}
}  // namespace emulator
struct cudaFuncAttributes {
  size_t sharedSizeBytes, constSizeBytes, localSizeBytes;
  int maxThreadsPerBlock, numRegs, ptxVersion, binaryVersion;
};
inline cudaError_t cudaGetDevice(int* device) { return *device = emulator::device().current, emulator::device().driver_error; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel kernel, cudaFuncAttribute, int bytes) {
  if (bytes > emulator::shared_memory_of_multiprocessor() - 1024) return cudaErrorInvalidValue;
  emulator::device().shared_allowed[reinterpret_cast<const void*>(kernel)] = bytes;
  return emulator::device().code_error;
}
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel) {
  *attributes = {0, 0, 0, 1024, 0, 90, 90};
  return emulator::device().code_error;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = 2; break;
    case cudaDevAttrComputeCapabilityMajor: *value = emulator::device().capability / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = emulator::device().capability % 10; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = emulator::shared_memory_of_multiprocessor(); break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = emulator::shared_memory_of_multiprocessor() - 1024; break;
  }
  return emulator::device().driver_error;
}
