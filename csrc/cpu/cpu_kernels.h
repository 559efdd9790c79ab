// The C++ kernels for CPUs as the op layer sees them. No torch header: threads are borrowed through a function pointer.
#pragma once

#include <cstdint>
#include <string>

#include "../zero_gate_params.h"

namespace lak::cpu {

// Runs body(context, begin, end) over disjoint ranges that cover [0, count), possibly in parallel, and returns when all
// are done. `threads` is how many may run at once. The op passes torch's pool, a test driver its own.
struct Parallel {
  int threads;
  void (*run)(int64_t count, void (*body)(void* context, int64_t begin, int64_t end), void* context);
};

// Instruction sets the same sources are compiled for, weakest first.
enum class Isa : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmxBf16 = 4 };

const char* isa_name(Isa isa);  // "baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16"
bool isa_supported(Isa isa);    // built in, and this CPU and operating system can run it

// The kernels of one instruction set. An operation asks for them once and uses the same ones to size its workspace and to run.
struct Kernels {
  Isa isa;
  // Bytes of params.workspace each operation needs.
  int64_t (*forward_workspace)(const ZeroGateParams& params, int threads);
  int64_t (*backward_workspace)(const ZeroGateParams& params, int threads);
  int64_t (*decode_workspace)(const ZeroGateParams& params, int threads);
  void (*forward)(const ZeroGateParams& params, const Parallel& parallel);
  void (*backward)(const ZeroGateParams& params, const Parallel& parallel);
  // Few new queries against a long cache: keys are split over threads. Same fields as forward; no mask, no varlen.
  void (*decode)(const ZeroGateParams& params, const Parallel& parallel);
};

// Of the best instruction set that is supported; or of the one that LAK_CPU_ISA named when the process first asked (the
// environment is read once: another thread may be changing it); or of the one that tests force at the moment. Throws
// std::runtime_error when LAK_CPU_ISA is unknown or not supported here.
const Kernels& kernels();

// For tests: until the next call every operation that begins uses the instruction set of this name; "" ends that. Throws
// std::runtime_error when it is unknown or not supported here.
void force_isa(const std::string& name);

}  // namespace lak::cpu
