// Loads and stores by address. Kernels touch shared and global memory through these alone, so that the emulator
// (tests/emulator/include/ptx) can check each access.
#pragma once

#include <cstdint>

namespace lak::ptx {

// blockIdx.x, read anew: what is computed from it twice is not kept in registers in between.
__device__ __forceinline__ unsigned block_index() {
  unsigned index;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
  return index;
}

// threadIdx.x likewise.
__device__ __forceinline__ int thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

// x, of which the compiler knows nothing: what is computed from it is not kept either.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Offset of the block's dynamic shared memory in the shared window.
__device__ __forceinline__ uint32_t dynamic_shared_memory() {
  extern __shared__ __align__(1024) unsigned char lak_shared_memory[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(lak_shared_memory));
}

template <class T>
__device__ __forceinline__ T load_shared(uint32_t address) {
  return *static_cast<const T*>(__cvta_shared_to_generic(address));
}
template <class T>
__device__ __forceinline__ void store_shared(uint32_t address, T value) {
  *static_cast<T*>(__cvta_shared_to_generic(address)) = value;
}
template <class T>
__device__ __forceinline__ T load_global(const T* address) {
  return *address;
}
template <class T>
__device__ __forceinline__ void store_global(T* address, T value) {
  *address = value;
}
// No result comes back: one reduction instruction.
__device__ __forceinline__ void add_global(float* address, float value) {
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(__cvta_generic_to_global(address)), "f"(value) : "memory");
}

}  // namespace lak::ptx
