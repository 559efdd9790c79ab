#pragma once

#include "sm80/forward.h"
#include "sm80/forward_choice.h"
#include "sm80/launchers.h"
#include "sm80/zero_tail.h"

namespace lak::sm80 {

template <class T, int kHeadDim, ForwardKind kKind>
int launch_forward_kernel(const ZeroGateParams& params, cudaStream_t stream) {
  using Memory = ForwardMemory<T, kHeadDim, kKind>;
  const Extent extent = extent_of(params);
  const int64_t row_blocks = ceil_div(extent.rows, Memory::Tiles::kRows);
  return launch<forward_kernel<T, kHeadDim, kKind>, Memory::kBytes>(row_blocks * params.heads_q * extent.sequences, kThreads,
                                                                    stream, params, static_cast<int>(row_blocks));
}

template <class T, int kHeadDim>
int launch_forward_of_kind(const ZeroGateParams& params, cudaStream_t stream) {
  if constexpr (kIsTuned<T, kHeadDim>) {
    if (!needs_elementwise_scores(params)) {
      if constexpr (kHeadDim == 128) {
        if (takes_small_tiles(capability(), fits_twice(ForwardMemory<T, kHeadDim, ForwardKind::kPlain>::kBytes))) {
          return launch_forward_kernel<T, kHeadDim, ForwardKind::kSmall>(params, stream);
        }
      }
      return launch_forward_kernel<T, kHeadDim, ForwardKind::kPlain>(params, stream);
    }
  }
  return launch_forward_kernel<T, kHeadDim, ForwardKind::kElementwise>(params, stream);
}

template <class T, int kHeadDim>
int launch_forward(const ZeroGateParams& params, cudaStream_t stream) {
  const int code = launch_forward_of_kind<T, kHeadDim>(params, stream);
  return code == kLakSuccess ? zero_tail<T>(params, false, stream) : code;
}

}  // namespace lak::sm80
