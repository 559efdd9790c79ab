// The functions every instruction set provides, in a namespace of its own, and the table of them.
#pragma once

#include "cpu_kernels.h"

namespace lak::cpu {

#define LAK_DECLARE_KERNELS(namespace_, isa)                                                                                  \
  namespace namespace_ {                                                                                                      \
  int64_t forward_workspace(const ZeroGateParams&, int);                                                                      \
  int64_t backward_workspace(const ZeroGateParams&, int);                                                                     \
  int64_t decode_workspace(const ZeroGateParams&, int);                                                                       \
  void forward(const ZeroGateParams&, const Parallel&);                                                                       \
  void backward(const ZeroGateParams&, const Parallel&);                                                                      \
  void decode(const ZeroGateParams&, const Parallel&);                                                                        \
  inline constexpr Kernels kKernels{isa, forward_workspace, backward_workspace, decode_workspace, forward, backward, decode}; \
  }

LAK_DECLARE_KERNELS(baseline, Isa::kBaseline)
#if defined(__x86_64__)
LAK_DECLARE_KERNELS(avx2, Isa::kAvx2)
LAK_DECLARE_KERNELS(avx512, Isa::kAvx512)
LAK_DECLARE_KERNELS(avx512_bf16, Isa::kAvx512Bf16)
#endif
#undef LAK_DECLARE_KERNELS

}  // namespace lak::cpu
