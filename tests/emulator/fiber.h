// Context switch between stacks. x86-64 in nine instructions (swapcontext would make a system call per switch);
// ucontext elsewhere.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {

struct Fiber {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
};

constexpr size_t kStackBytes = 256 * 1024;

// Prepares `fiber` to call entry(argument) on the stack that ends at stack + kStackBytes. entry never returns.
void make_fiber(Fiber& fiber, uint8_t* stack, void (*entry)(void*), void* argument);
void switch_fiber(Fiber& from, Fiber& to);

}  // namespace emulator
