// Chooses the instruction set once per call and forwards to its kernels.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernel_table.h"

namespace lak::cpu {
namespace {

constexpr Isa kAll[] = {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16};

// CPUID and the operating system's register saving, asked once.
bool detect(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  switch (isa) {
    case Isa::kBaseline: return true;
    case Isa::kAvx2: return avx2;
    case Isa::kAvx512: return avx512;
#if defined(LAK_BF16_STAND_IN)
    case Isa::kAvx512Bf16: return LAK_BF16_STAND_IN;  // avx2 or avx512: what the stand-in is compiled for
#else
    case Isa::kAvx512Bf16: return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  }
#endif
  return isa == Isa::kBaseline;
}

const KernelTable& table() {
  switch (selected_isa()) {
#if defined(__x86_64__)
    case Isa::kAvx2: return avx2::kTable;
    case Isa::kAvx512: return avx512::kTable;
    case Isa::kAvx512Bf16: return avx512_bf16::kTable;
#endif
    default: return baseline::kTable;
  }
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kBaseline: return "baseline";
    case Isa::kAvx2: return "avx2";
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx512Bf16: return "avx512_bf16";
  }
  return "unknown";
}

bool isa_supported(Isa isa) {
  static const bool supported[] = {detect(kAll[0]), detect(kAll[1]), detect(kAll[2]), detect(kAll[3])};
  return supported[static_cast<int>(isa)];
}

Isa selected_isa() {
  const char* wanted = std::getenv("LAK_CPU_ISA");
  Isa best = Isa::kBaseline;
  std::string usable;
  for (Isa isa : kAll) {
    if (!isa_supported(isa)) continue;
    best = isa;
    if (wanted != nullptr && std::string(wanted) == isa_name(isa)) return isa;
    if (!usable.empty()) usable += ", ";
    usable += isa_name(isa);
  }
  if (wanted != nullptr && *wanted != '\0') {
    throw std::runtime_error("LAK_CPU_ISA: expected one of " + usable + " on this CPU, got " + wanted);
  }
  return best;
}

int64_t forward_workspace(const ZeroGateParams& params, int threads) { return table().forward_workspace(params, threads); }
int64_t backward_workspace(const ZeroGateParams& params, int threads) { return table().backward_workspace(params, threads); }
int64_t decode_workspace(const ZeroGateParams& params, int threads) { return table().decode_workspace(params, threads); }
void forward(const ZeroGateParams& params, const Parallel& parallel) { table().forward(params, parallel); }
void backward(const ZeroGateParams& params, const Parallel& parallel) { table().backward(params, parallel); }
void decode(const ZeroGateParams& params, const Parallel& parallel) { table().decode(params, parallel); }

}  // namespace lak::cpu
