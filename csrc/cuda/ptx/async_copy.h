// cp.async: global to shared memory past the registers, 16 bytes a thread.
#pragma once

#include <cstdint>

namespace lak::ptx {

// Zeros are written where `valid` is false; `source` is then not read and may be any address.
__device__ __forceinline__ void copy_async_16(uint32_t target, const void* source, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(__cvta_generic_to_global(source)), "r"(bytes)
               : "memory");
}
// The same for a single float32, for rows of statistics that start anywhere.
__device__ __forceinline__ void copy_async_4(uint32_t target, const void* source, bool valid) {
  const int bytes = valid ? 4 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(target), "l"(__cvta_generic_to_global(source)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void commit_async_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kGroupsInFlight of this thread's groups have not landed; other threads see the data after a barrier.
template <int kGroupsInFlight>
__device__ __forceinline__ void wait_async_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsInFlight) : "memory");
}

}  // namespace lak::ptx
