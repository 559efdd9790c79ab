// Chooses the instruction set.
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernel_table.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lak::cpu {
namespace {

constexpr Isa kAll[] = {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16, Isa::kAmxBf16};

#if defined(__x86_64__) && !defined(LAK_BF16_STAND_IN)
// AMX's registers are 8 KiB, which Linux saves only for processes that have asked for them. It also refuses where a signal stack
// would be too small.
bool amx_bf16_permitted() {
#if defined(__linux__)
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;  // of leaf 7
  constexpr int kAskForFeature = 0x1023, kTileData = 18;   // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kBf16) && (d & kTiles) &&
         syscall(SYS_arch_prctl, kAskForFeature, kTileData) == 0;
#else
  return false;
#endif
}
#endif

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
    case Isa::kAvx512Bf16:
    case Isa::kAmxBf16: return LAK_BF16_STAND_IN;  // avx2 or avx512: what the stand-in is compiled for
#else
    case Isa::kAvx512Bf16: return avx512 && __builtin_cpu_supports("avx512bf16");
    case Isa::kAmxBf16: return avx512 && __builtin_cpu_supports("avx512bf16") && amx_bf16_permitted();
#endif
  }
#endif
  return isa == Isa::kBaseline;
}

#define LAK_KERNELS(isa, name)                                                                                     \
  Kernels {                                                                                                        \
    isa, name::forward_workspace, name::backward_workspace, name::decode_workspace, name::forward, name::backward, \
        name::decode                                                                                               \
  }
constexpr Kernels kBaseline = LAK_KERNELS(Isa::kBaseline, baseline);
#if defined(__x86_64__)
constexpr Kernels kAvx2 = LAK_KERNELS(Isa::kAvx2, avx2), kAvx512 = LAK_KERNELS(Isa::kAvx512, avx512);

// Instructions that multiply bfloat16 have forward and backward of bfloat16. All other problems, and decode, which reads more than it
// multiplies, go to the kernels of the vectors that every such CPU has: `kRest`.
template <bool (*kTakes)(const ZeroGateParams&), const Kernels& kSome, const Kernels& kRest>
constexpr Kernels with_rest() {
  return {kSome.isa,
          [](const ZeroGateParams& p, int threads) { return (kTakes(p) ? kSome : kRest).forward_workspace(p, threads); },
          [](const ZeroGateParams& p, int threads) { return (kTakes(p) ? kSome : kRest).backward_workspace(p, threads); },
          kRest.decode_workspace,
          [](const ZeroGateParams& p, const Parallel& parallel) { (kTakes(p) ? kSome : kRest).forward(p, parallel); },
          [](const ZeroGateParams& p, const Parallel& parallel) { (kTakes(p) ? kSome : kRest).backward(p, parallel); },
          kRest.decode};
}
// Elements come in pairs. Of tiles at least half should be in use.
bool has_pairs(const ZeroGateParams& params) { return params.dtype == DataType::kBFloat16 && params.head_dim % 2 == 0; }
bool fills_tiles(const ZeroGateParams& params) { return has_pairs(params) && params.head_dim >= 16; }

#if defined(LAK_BF16_STAND_IN)  // avx2 or avx512: what the stand-in is compiled for
constexpr Kernels kVectors = LAK_KERNELS(Isa::kAvx512, LAK_BF16_STAND_IN);
#else
constexpr const Kernels& kVectors = kAvx512;
#endif
#define LAK_BF16_KERNELS(isa, name) \
  Kernels { isa, name::forward_workspace, name::backward_workspace, nullptr, name::forward, name::backward, nullptr }
constexpr Kernels kPairs = LAK_BF16_KERNELS(Isa::kAvx512Bf16, avx512_bf16);
constexpr Kernels kTiles = LAK_BF16_KERNELS(Isa::kAmxBf16, amx_bf16);
constexpr Kernels kAvx512Bf16 = with_rest<has_pairs, kPairs, kVectors>();
constexpr Kernels kAmxBf16 = with_rest<fills_tiles, kTiles, kAvx512Bf16>();
#endif

const Kernels& kernels_of(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAvx2: return kAvx2;
    case Isa::kAvx512: return kAvx512;
    case Isa::kAvx512Bf16: return kAvx512Bf16;
    case Isa::kAmxBf16: return kAmxBf16;
#endif
    default: return kBaseline;
  }
}

// The supported one of this name. Throws std::runtime_error, which begins with `source`, where there is none.
Isa isa_named(const std::string& name, const char* source) {
  std::string usable;
  for (Isa isa : kAll) {
    if (!isa_supported(isa)) continue;
    if (name == isa_name(isa)) return isa;
    if (!usable.empty()) usable += ", ";
    usable += isa_name(isa);
  }
  throw std::runtime_error(std::string(source) + ": expected one of " + usable + " on this CPU, got " + name);
}

Isa best_isa() {
  Isa best = Isa::kBaseline;
  for (Isa isa : kAll) {
    if (isa_supported(isa)) best = isa;
  }
  return best;
}

Isa isa_of_environment() {
  const char* wanted = std::getenv("LAK_CPU_ISA");
  return wanted == nullptr || *wanted == '\0' ? best_isa() : isa_named(wanted, "LAK_CPU_ISA");
}

std::atomic<const Kernels*> forced{nullptr};

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kBaseline: return "baseline";
    case Isa::kAvx2: return "avx2";
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx512Bf16: return "avx512_bf16";
    case Isa::kAmxBf16: return "amx_bf16";
  }
  return "unknown";
}

bool isa_supported(Isa isa) {
  static const bool supported[] = {detect(kAll[0]), detect(kAll[1]), detect(kAll[2]), detect(kAll[3]), detect(kAll[4])};
  return supported[static_cast<int>(isa)];
}

const Kernels& kernels() {
  if (const Kernels* now = forced.load(std::memory_order_acquire)) return *now;
  static const Kernels& of_process = kernels_of(isa_of_environment());  // where it throws, the next call tries again
  return of_process;
}

void force_isa(const std::string& name) {
  forced.store(name.empty() ? nullptr : &kernels_of(isa_named(name, "instruction set")), std::memory_order_release);
}

}  // namespace lak::cpu
