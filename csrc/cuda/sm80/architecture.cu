// The sm_80 family's entry in the C interface: compute capability 8.0 and every later one. Chooses the instantiation.
#include "architecture.h"
#include "sm80/backward/workspace.h"
#include "sm80/decode/workspace.h"
#include "sm80/forward_choice.h"
#include "sm80/kernel_table.h"
#include "sm80/launchers.h"

namespace lak::sm80 {
namespace {

// Calls work.operator()<T, padded head size>().
template <class Work>
auto for_instantiation(const ZeroGateParams& params, const Work& work) {
  const auto with_type = [&]<class T>() {
    if (params.head_dim <= 64) return work.template operator()<T, 64>();
    if (params.head_dim <= 128) return work.template operator()<T, 128>();
    return work.template operator()<T, 256>();
  };
  switch (params.dtype) {
    case DataType::kBFloat16: return with_type.template operator()<BFloat16>();
    case DataType::kFloat16: return with_type.template operator()<Float16>();
    default: return with_type.template operator()<float>();
  }
}

int forward(const ZeroGateParams& params, cudaStream_t stream) {
  return for_instantiation(params, [&]<class T, int kHeadDim>() { return launch_forward<T, kHeadDim>(params, stream); });
}

int backward(const ZeroGateParams& params, cudaStream_t stream) {
  return for_instantiation(params, [&]<class T, int kHeadDim>() { return launch_backward<T, kHeadDim>(params, stream); });
}

int decode(const ZeroGateParams& params, cudaStream_t stream) {
  return for_instantiation(params, [&]<class T, int kHeadDim>() { return launch_decode<T, kHeadDim>(params, stream); });
}

int64_t backward_bytes(const ZeroGateParams& params) {
  return for_instantiation(params, [&]<class T, int kHeadDim>() { return backward_workspace<T, kHeadDim>(params).bytes; });
}

int64_t decode_bytes(const ZeroGateParams& params) {
  const DecodeSplits grid(params);
  return DecodePartials(params, grid.splits, grid.row_tiles).bytes;
}

int choose_forward_keys(int capability, int keys) {
  if (capability >= kCapabilities || (keys != 0 && keys != 32 && keys != 64)) return kLakBadTile;
  forward_keys[capability].store(keys, std::memory_order_relaxed);
  return kLakSuccess;
}

__global__ void probe_kernel() {}

int probe() {
  cudaFuncAttributes attributes;
  return code_of(cudaFuncGetAttributes(&attributes, probe_kernel));
}

}  // namespace

const Architecture kArchitecture{80,    forward,     backward, decode, backward_bytes, decode_bytes, choose_forward_keys,
                                 probe, list_kernels};

}  // namespace lak::sm80
