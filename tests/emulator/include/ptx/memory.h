// Emulates csrc/cuda/ptx/memory.h: every access is checked against the memory that was registered or allocated.
#pragma once

#include <atomic>

#include "cuda_runtime.h"

namespace lak::ptx {

using emulator::Where;

inline unsigned block_index() { return blockIdx.x; }
inline int opaque(int x) { return x; }
inline int thread_index() { return threadIdx.x; }
inline uint32_t dynamic_shared_memory() { return emulator::Block::kSharedBase; }

template <class T>
T load_shared(uint32_t address, Where where = Where::current()) {
  T value;
  emulator::active_block().read_shared(address, &value, sizeof(T), where);
  return value;
}
template <class T>
void store_shared(uint32_t address, T value, Where where = Where::current()) {
  emulator::active_block().write_shared(address, &value, sizeof(T), where);
}
template <class T>
T load_global(const T* address, Where where = Where::current()) {
  emulator::check_global(address, sizeof(T), emulator::Access::kRead, where);
  T value;
  std::memcpy(&value, address, sizeof(T));
  return value;
}
template <class T>
void store_global(T* address, T value, Where where = Where::current()) {
  emulator::check_global(address, sizeof(T), emulator::Access::kWrite, where);
  std::memcpy(address, &value, sizeof(T));
}
inline void add_global(float* address, float value, Where where = Where::current()) {
  emulator::check_global(address, sizeof(float), emulator::Access::kAdd, where);
  emulator::active_block().note_reduction(address);
  std::atomic_ref<float>(*address).fetch_add(value, std::memory_order_relaxed);
}

}  // namespace lak::ptx
