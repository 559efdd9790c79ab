// Emulates csrc/cuda/ptx/async_copy.h: data lands at the wait for its group and not before.
#pragma once

#include "cuda_runtime.h"

namespace lak::ptx {

inline void copy_async_16(uint32_t target, const void* source, bool valid, emulator::Where where = emulator::Where::current()) {
  emulator::active_block().issue_copy(target, valid ? source : nullptr, 16, where);
}
inline void copy_async_4(uint32_t target, const void* source, bool valid, emulator::Where where = emulator::Where::current()) {
  emulator::active_block().issue_copy(target, valid ? source : nullptr, 4, where);
}
inline void commit_async_copies() { emulator::active_block().commit_copies(); }
template <int kGroupsInFlight>
void wait_async_copies() {
  emulator::active_block().wait_copies(kGroupsInFlight);
}

}  // namespace lak::ptx
