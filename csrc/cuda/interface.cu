// Checks what the kernels assume, once, and chooses the instantiation.
#include "interface.h"

#include "launchers.h"
#include "sm80/backward/workspace.h"
#include "sm80/decode/launch.h"

namespace {

using lak::DataType;
using lak::TensorView;
using lak::ZeroGateParams;

bool aligned(const TensorView& v, int64_t rows, int64_t element) {
  if (v.data == nullptr || rows == 0) return true;
  const int64_t strides = v.stride_batch | v.stride_head | v.stride_row;
  return reinterpret_cast<uintptr_t>(v.data) % 16 == 0 && strides * element % 16 == 0;
}

int check(const ZeroGateParams& p) {
  constexpr int64_t kMostRows = int64_t{1} << 30;  // row numbers and their sums with a tile stay within int32
  if (p.dtype == DataType::kFloat64) return kLakBadDtype;
  if (p.head_dim < 8 || p.head_dim > 256 || p.head_dim % 8 != 0) return kLakBadHeadDim;
  for (int64_t size : {p.batch, p.heads_q, p.seq_q, p.seq_k, p.total_q, p.total_k, p.prefix_length, p.prefix_count}) {
    if (size < 0 || size > kMostRows) return kLakBadSize;
  }
  if (p.heads_kv < 1 || p.heads_q % p.heads_kv != 0) return kLakBadSize;
  const int64_t element = p.dtype == DataType::kFloat32 ? 4 : 2;
  const int64_t prefix = p.prefix_count * p.prefix_length;
  const bool all = aligned(p.query, p.total_q, element) && aligned(p.key, p.total_k, element) &&
                   aligned(p.value, p.total_k, element) && aligned(p.prefix_key, prefix, element) &&
                   aligned(p.prefix_value, prefix, element) && aligned(p.output, p.total_q, element) &&
                   aligned(p.doutput, p.total_q, element) && aligned(p.dquery, p.total_q, element) &&
                   aligned(p.dkey, p.total_k, element) && aligned(p.dvalue, p.total_k, element);
  return all ? kLakSuccess : kLakMisaligned;
}

// Calls work.operator()<T, padded head size>().
template <class Work>
int for_instantiation(const ZeroGateParams& p, const Work& work) {
  const auto with_type = [&]<class T>() {
    if (p.head_dim <= 64) return work.template operator()<T, 64>();
    if (p.head_dim <= 128) return work.template operator()<T, 128>();
    return work.template operator()<T, 256>();
  };
  switch (p.dtype) {
    case DataType::kBFloat16: return with_type.template operator()<lak::BFloat16>();
    case DataType::kFloat16: return with_type.template operator()<lak::Float16>();
    case DataType::kFloat32: return with_type.template operator()<float>();
    default: return kLakBadDtype;
  }
}

}  // namespace

extern "C" {

const char* lak_cuda_error(int code) {
  switch (code) {
    case kLakSuccess: return "success";
    case kLakBadDtype: return "query: expected float32, bfloat16 or float16";
    case kLakBadHeadDim: return "query: expected a head_dim that is a multiple of 8 up to 256";
    case kLakMisaligned: return "every tensor: expected data and strides that are multiples of 16 bytes";
    case kLakBadSize: return "sizes: expected from 0 to 2^30, and a number of key heads that divides the query heads";
    case kLakGridTooLarge: return "sizes: batch x heads x blocks of rows exceed 2^31 - 1 thread blocks";
    case kLakNoCodeForDevice: return "the device has no compiled code here; built architectures: " LAK_CUDA_ARCHITECTURES;
    case kLakTooMuchSharedMemory: return "the device has too little shared memory for this kernel (99 KiB a block are needed)";
    case kLakNoWorkspace: return "workspace: expected memory, got none";
    default: return code > kLakCudaError ? cudaGetErrorString(static_cast<cudaError_t>(code - kLakCudaError)) : "unknown error";
  }
}

int lak_cuda_forward(const ZeroGateParams* params, void* stream) {
  if (const int code = check(*params); code != kLakSuccess) return code;
  return for_instantiation(*params, [&]<class T, int kHeadDim>() {
    return lak::launch_forward<T, kHeadDim>(*params, static_cast<cudaStream_t>(stream));
  });
}

int64_t lak_cuda_decode_workspace(const ZeroGateParams* params) {
  const ZeroGateParams& p = *params;
  if (check(p) != kLakSuccess) return 0;
  const int64_t rows = p.batch * p.heads_kv * lak::decode_row_tiles(p) * lak::decode_splits(p) * 16;
  return rows * (p.head_dim + 2) * 4;
}

int lak_cuda_decode(const ZeroGateParams* params, void* stream) {
  if (const int code = check(*params); code != kLakSuccess) return code;
  return for_instantiation(*params, [&]<class T, int kHeadDim>() {
    return lak::launch_decode<T, kHeadDim>(*params, static_cast<cudaStream_t>(stream));
  });
}

int64_t lak_cuda_backward_workspace(const ZeroGateParams* params) {
  if (check(*params) != kLakSuccess) return 0;
  int64_t bytes = 0;
  for_instantiation(*params, [&]<class T, int kHeadDim>() {
    bytes = lak::backward_workspace<T, kHeadDim>(*params).bytes;
    return int{kLakSuccess};
  });
  return bytes;
}

int lak_cuda_backward(const ZeroGateParams* params, void* stream) {
  if (const int code = check(*params); code != kLakSuccess) return code;
  return for_instantiation(*params, [&]<class T, int kHeadDim>() {
    return lak::launch_backward<T, kHeadDim>(*params, static_cast<cudaStream_t>(stream));
  });
}
}
