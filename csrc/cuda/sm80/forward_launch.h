#pragma once

#include "sm80/forward.h"
#include "sm80/launchers.h"

namespace lak::sm80 {

template <class T, int kHeadDim, bool kElementwise>
int launch_forward_kernel(const ZeroGateParams& p, cudaStream_t stream) {
  using Memory = ForwardMemory<T, kHeadDim, kElementwise>;
  const int64_t row_blocks = ceil_div(p.seq_q, Memory::Tiles::kRows);
  return launch<forward_kernel<T, kHeadDim, kElementwise>, Memory::kBytes>(row_blocks * p.heads_q * p.batch, kThreads, stream,
                                                                           p, static_cast<int>(row_blocks));
}

template <class T, int kHeadDim>
int launch_forward(const ZeroGateParams& p, cudaStream_t stream) {
  if constexpr (kIsTuned<T, kHeadDim>) {
    if (!needs_elementwise_scores(p)) return launch_forward_kernel<T, kHeadDim, false>(p, stream);
  }
  return launch_forward_kernel<T, kHeadDim, true>(p, stream);
}

}  // namespace lak::sm80
