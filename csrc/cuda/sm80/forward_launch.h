#pragma once

#include "sm80/forward.h"
#include "sm80/launchers.h"
#include "sm80/zero_tail.h"

namespace lak::sm80 {

template <class T, int kHeadDim, ForwardKind kKind>
int launch_forward_kernel(const ZeroGateParams& p, cudaStream_t stream) {
  using Memory = ForwardMemory<T, kHeadDim, kKind>;
  const Extent extent = extent_of(p);
  const int64_t row_blocks = ceil_div(extent.rows, Memory::Tiles::kRows);
  return launch<forward_kernel<T, kHeadDim, kKind>, Memory::kBytes>(row_blocks * p.heads_q * extent.sequences, kThreads, stream,
                                                                    p, static_cast<int>(row_blocks));
}

template <class T, int kHeadDim>
int launch_forward_of_kind(const ZeroGateParams& p, cudaStream_t stream) {
  if constexpr (kIsTuned<T, kHeadDim>) {
    if (!needs_elementwise_scores(p)) {
      if constexpr (kHeadDim == 128) {
        if (!fits_twice(ForwardMemory<T, kHeadDim, ForwardKind::kPlain>::kBytes)) {
          return launch_forward_kernel<T, kHeadDim, ForwardKind::kSmall>(p, stream);
        }
      }
      return launch_forward_kernel<T, kHeadDim, ForwardKind::kPlain>(p, stream);
    }
  }
  return launch_forward_kernel<T, kHeadDim, ForwardKind::kElementwise>(p, stream);
}

template <class T, int kHeadDim>
int launch_forward(const ZeroGateParams& p, cudaStream_t stream) {
  const int code = launch_forward_of_kind<T, kHeadDim>(p, stream);
  return code == kLakSuccess ? zero_tail<T>(p, false, stream) : code;
}

}  // namespace lak::sm80
