// The functions that instruction sets provide, each in a namespace of its own. dispatch.cpp has the tables of them.
#pragma once

#include "cpu_kernels.h"

#define LAK_DECLARE_KERNELS(isa)                          \
  namespace lak::cpu::isa {                               \
  int64_t forward_workspace(const ZeroGateParams&, int);  \
  int64_t backward_workspace(const ZeroGateParams&, int); \
  int64_t decode_workspace(const ZeroGateParams&, int);   \
  void forward(const ZeroGateParams&, const Parallel&);   \
  void backward(const ZeroGateParams&, const Parallel&);  \
  void decode(const ZeroGateParams&, const Parallel&);    \
  }

LAK_DECLARE_KERNELS(baseline)
#if defined(__x86_64__)
LAK_DECLARE_KERNELS(avx2)
LAK_DECLARE_KERNELS(avx512)
LAK_DECLARE_KERNELS(avx512_bf16)  // forward and backward alone
LAK_DECLARE_KERNELS(amx_bf16)     // likewise
#endif
#undef LAK_DECLARE_KERNELS
