#pragma once

#include "sm80/forward.h"
#include "sm80/launchers.h"
#include "sm80/zero_tail.h"

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
  int code = kLakSuccess;
  if constexpr (kIsTuned<T, kHeadDim>) {
    code = needs_elementwise_scores(p) ? launch_forward_kernel<T, kHeadDim, true>(p, stream)
                                       : launch_forward_kernel<T, kHeadDim, false>(p, stream);
  } else {
    code = launch_forward_kernel<T, kHeadDim, true>(p, stream);
  }
  if (code != kLakSuccess || p.cu_seqlens_q == nullptr) return code;
  Tails tails{};
  tails.add(p.output, p.total_q, p.heads_q, p.cu_seqlens_q + p.batch);
  return launch_zero_tail<T>(tails, p.head_dim, stream);
}

}  // namespace lak::sm80
