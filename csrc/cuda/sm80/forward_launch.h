#pragma once

#include <ptx/launch.h>

#include "launchers.h"
#include "sm80/forward.h"

namespace lak {

template <class T, int kHeadDim>
int launch_forward(const ZeroGateParams& p, cudaStream_t stream) {
  const int64_t row_blocks = ceil_div(p.seq_q, ForwardTiles<T, kHeadDim>::kRows);
  const int64_t blocks = row_blocks * p.heads_q * p.batch;
  if (blocks == 0) return kLakSuccess;
  if (!grid_fits(blocks)) return kLakGridTooLarge;
  constexpr int kBytes = ForwardMemory<T, kHeadDim>::kBytes;
  static_assert(kBytes <= 99 * 1024, "compute capability 8.6 has 99 KiB of shared memory a block");
  const auto run = [&](auto elementwise) {
    constexpr auto kKernel = forward_kernel<T, kHeadDim, decltype(elementwise)::value>;
    static const int allowed = allow_shared_memory(kKernel, kBytes);
    if (allowed != kLakSuccess) return allowed;
    return launch_result(ptx::launch<kKernel>(blocks, kThreads, kBytes, stream, p, static_cast<int>(row_blocks)));
  };
  if constexpr (kIsTuned<T, kHeadDim>) {
    if (!needs_elementwise_scores(p)) return run(std::false_type{});
  }
  return run(std::true_type{});
}

}  // namespace lak
