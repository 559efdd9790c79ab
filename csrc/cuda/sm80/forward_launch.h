#pragma once

#include <ptx/launch.h>

#include "launchers.h"
#include "sm80/forward.h"

namespace lak {

template <class T, int kHeadDim, bool kElementwise>
int launch_forward_kernel(const ZeroGateParams& p, cudaStream_t stream) {
  using Memory = ForwardMemory<T, kHeadDim, kElementwise>;
  static_assert(Memory::kBytes <= 99 * 1024, "compute capability 8.6 has 99 KiB of shared memory a block");
  constexpr auto kKernel = forward_kernel<T, kHeadDim, kElementwise>;
  const int64_t row_blocks = ceil_div(p.seq_q, Memory::Tiles::kRows);
  const int64_t blocks = row_blocks * p.heads_q * p.batch;
  if (blocks == 0) return kLakSuccess;
  if (!grid_fits(blocks)) return kLakGridTooLarge;
  const int allowed = allow_shared_memory(kKernel, Memory::kBytes);
  if (allowed != kLakSuccess) return allowed;
  return code_of(ptx::launch<kKernel>(blocks, kThreads, Memory::kBytes, stream, p, static_cast<int>(row_blocks)));
}

template <class T, int kHeadDim>
int launch_forward(const ZeroGateParams& p, cudaStream_t stream) {
  if constexpr (kIsTuned<T, kHeadDim>) {
    if (!needs_elementwise_scores(p)) return launch_forward_kernel<T, kHeadDim, false>(p, stream);
  }
  return launch_forward_kernel<T, kHeadDim, true>(p, stream);
}

}  // namespace lak
