#include "fiber.h"

namespace emulator {

#if defined(__x86_64__)

// Saves what the calling convention lets a callee not change; everything else the compiler holds saved already.
asm(R"(
.text
.globl lak_emulator_switch
.hidden lak_emulator_switch
.type lak_emulator_switch, @function
lak_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq (%rsi), %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size lak_emulator_switch, .-lak_emulator_switch

.globl lak_emulator_start
.hidden lak_emulator_start
.type lak_emulator_start, @function
lak_emulator_start:
  movq %r12, %rdi
  callq *%r13
  ud2
.size lak_emulator_start, .-lak_emulator_start
)");

extern "C" void lak_emulator_switch(void** save, void** load);
extern "C" void lak_emulator_start();

void make_fiber(Fiber& fiber, uint8_t* stack, void (*entry)(void*), void* argument) {
  auto* top = reinterpret_cast<void**>(stack + kStackBytes);
  *--top = nullptr;  // keeps the stack 16-byte aligned at the call in lak_emulator_start
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&lak_emulator_start);  // return address of the first switch
  *--top = nullptr;                                       // rbp
  *--top = nullptr;                                       // rbx
  *--top = argument;                                      // r12
  *--top = reinterpret_cast<void*>(entry);                // r13
  *--top = nullptr;                                       // r14
  *--top = nullptr;                                       // r15
  fiber.stack_pointer = top;
}

void switch_fiber(Fiber& from, Fiber& to) { lak_emulator_switch(&from.stack_pointer, &to.stack_pointer); }

#else

namespace {
void start(unsigned entry_high, unsigned entry_low, unsigned argument_high, unsigned argument_low) {
  const auto join = [](unsigned high, unsigned low) { return (static_cast<uintptr_t>(high) << 32) | low; };
  reinterpret_cast<void (*)(void*)>(join(entry_high, entry_low))(reinterpret_cast<void*>(join(argument_high, argument_low)));
}
}  // namespace

void make_fiber(Fiber& fiber, uint8_t* stack, void (*entry)(void*), void* argument) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  const auto e = reinterpret_cast<uintptr_t>(entry), a = reinterpret_cast<uintptr_t>(argument);
  makecontext(&fiber.context, reinterpret_cast<void (*)()>(&start), 4, static_cast<unsigned>(e >> 32), static_cast<unsigned>(e),
              static_cast<unsigned>(a >> 32), static_cast<unsigned>(a));
}

void switch_fiber(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

#endif

}  // namespace emulator
