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

// Tiles of AMX hold bfloat16 in pairs and at least half of them should be in use. All other problems, and decode, which reads more
// than it multiplies, go to the vectors that every such CPU has.
namespace amx_bf16 {
int64_t forward_workspace(const ZeroGateParams&, int);
int64_t backward_workspace(const ZeroGateParams&, int);
void forward(const ZeroGateParams&, const Parallel&);
void backward(const ZeroGateParams&, const Parallel&);

inline bool tiles_fit(const ZeroGateParams& params) {
  return params.dtype == DataType::kBFloat16 && params.head_dim % 2 == 0 && params.head_dim >= 16;
}
template <auto kOfTiles, auto kOfVectors, class... Arguments>
auto chosen(const ZeroGateParams& params, Arguments... arguments) {
  return tiles_fit(params) ? kOfTiles(params, arguments...) : kOfVectors(params, arguments...);
}
inline constexpr Kernels kKernels{Isa::kAmxBf16,
                                  chosen<forward_workspace, avx512_bf16::forward_workspace, int>,
                                  chosen<backward_workspace, avx512_bf16::backward_workspace, int>,
                                  avx512_bf16::decode_workspace,
                                  chosen<forward, avx512_bf16::forward, const Parallel&>,
                                  chosen<backward, avx512_bf16::backward, const Parallel&>,
                                  avx512_bf16::decode};
}  // namespace amx_bf16
#endif
#undef LAK_DECLARE_KERNELS

}  // namespace lak::cpu
