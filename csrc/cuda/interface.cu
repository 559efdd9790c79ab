// Checks what every kernel assumes, once, and chooses the kernels of the current device's architecture.
#include "interface.h"

#include <string>

#include "architecture.h"
#include "launch_kernel.h"

namespace {

using lak::Architecture;
using lak::DataType;
using lak::TensorView;
using lak::ZeroGateParams;

// The families that are compiled, newest first: a device runs the first whose least compute capability it has. Kernels for
// Hopper (sm90/, with flags of their own) will stand before these.
constexpr const Architecture* kArchitectures[] = {&lak::sm80::kArchitecture};

bool aligned(const TensorView& v, int64_t rows, int64_t element) {
  if (v.data == nullptr || rows == 0) return true;
  const int64_t strides = v.stride_batch | v.stride_head | v.stride_row;
  return reinterpret_cast<uintptr_t>(v.data) % 16 == 0 && strides * element % 16 == 0;
}

int check(const ZeroGateParams& params) {
  constexpr int64_t kMostRows = int64_t{1} << 30;  // row numbers and their sums with a tile stay within int32
  if (params.dtype == DataType::kFloat64) return kLakBadDtype;
  if (params.head_dim < 8 || params.head_dim > 256 || params.head_dim % 8 != 0) return kLakBadHeadDim;
  for (int64_t size : {params.batch, params.heads_q, params.seq_q, params.seq_k, params.total_q, params.total_k,
                       params.prefix_length, params.prefix_count}) {
    if (size < 0 || size > kMostRows) return kLakBadSize;
  }
  if (params.heads_kv < 1 || params.heads_q % params.heads_kv != 0) return kLakBadSize;
  const int64_t element = params.dtype == DataType::kFloat32 ? 4 : 2;
  const int64_t prefix = params.prefix_count * params.prefix_length;
  const bool all = aligned(params.query, params.total_q, element) && aligned(params.key, params.total_k, element) &&
                   aligned(params.value, params.total_k, element) && aligned(params.prefix_key, prefix, element) &&
                   aligned(params.prefix_value, prefix, element) && aligned(params.output, params.total_q, element) &&
                   aligned(params.doutput, params.total_q, element) && aligned(params.dquery, params.total_q, element) &&
                   aligned(params.dkey, params.total_k, element) && aligned(params.dvalue, params.total_k, element);
  return all ? kLakSuccess : kLakMisaligned;
}

// The kernels for the current device, or why there are none. Neither call creates a context.
int choose_architecture(const Architecture*& chosen) {
  int device = 0, major = 0, minor = 0;
  if (const int code = lak::code_of(cudaGetDevice(&device)); code != kLakSuccess) return code;
  if (const int code = lak::code_of(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
      code != kLakSuccess)
    return code;
  if (const int code = lak::code_of(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
      code != kLakSuccess)
    return code;
  for (const Architecture* architecture : kArchitectures) {
    if (major * 10 + minor < architecture->least_capability) continue;
    chosen = architecture;
    return kLakSuccess;
  }
  return kLakDeviceTooOld;
}

// Within a major version of CUDA every driver serves (minor version compatibility). Only a card that is newer than all compiled
// architectures needs PTX, and with it a driver as new as the toolkit.
const std::string& driver_needed() {
  constexpr int kMajor = CUDART_VERSION / 1000, kMinor = CUDART_VERSION % 1000 / 10;
  static const std::string text = std::string("NVIDIA driver ") + (kMajor >= 13 ? "580" : "525") +
                                  " or later (built with CUDA " + std::to_string(kMajor) + "." + std::to_string(kMinor) +
                                  "; a GPU newer than compute capability " LAK_CUDA_ARCHITECTURES
                                  " needs the driver released with that CUDA, or later)";
  return text;
}

// work(architecture) for a problem that kernels can run, else the code of what is wrong with it.
template <class Work>
int with_architecture(const ZeroGateParams& params, const Work& work) {
  const Architecture* architecture = nullptr;
  if (const int code = check(params); code != kLakSuccess) return code;
  if (const int code = choose_architecture(architecture); code != kLakSuccess) return code;
  return work(*architecture);
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
    case kLakDeviceTooOld: return "needs a GPU of compute capability 8.0 or later";
    case kLakNoCodeForDevice: return "has no code for this GPU; compiled for compute capability " LAK_CUDA_ARCHITECTURES;
    case kLakDriverTooOld: {
      static const std::string text = "the driver is too old for the kernels: expected " + driver_needed();
      return text.c_str();
    }
    case kLakOutOfMemory: return "the GPU's memory does not suffice for a context and the kernels' code";
    case kLakBadTile:
      return "keys of forward's tiles: expected 64, 32, or 0 for the default, and a compute capability from 8.0 on";
    case kLakNoWorkspace: return "workspace: expected memory, got none";
    default: return code > kLakCudaError ? cudaGetErrorString(static_cast<cudaError_t>(code - kLakCudaError)) : "unknown error";
  }
}

int lak_cuda_probe(int* can_change) {
  const Architecture* architecture = nullptr;
  int code = choose_architecture(architecture);
  if (code == kLakSuccess) code = architecture->probe();
  *can_change = code == kLakOutOfMemory || code >= kLakCudaError;
  return code;
}

int lak_cuda_forward(const ZeroGateParams* params, void* stream) {
  return with_architecture(*params,
                           [&](const Architecture& a) { return a.forward(*params, static_cast<cudaStream_t>(stream)); });
}

int lak_cuda_backward(const ZeroGateParams* params, void* stream) {
  return with_architecture(*params,
                           [&](const Architecture& a) { return a.backward(*params, static_cast<cudaStream_t>(stream)); });
}

int lak_cuda_decode(const ZeroGateParams* params, void* stream) {
  return with_architecture(*params,
                           [&](const Architecture& a) { return a.decode(*params, static_cast<cudaStream_t>(stream)); });
}

int lak_cuda_choose_forward_keys(int capability, int keys) {
  for (const Architecture* architecture : kArchitectures) {
    if (capability >= architecture->least_capability) return architecture->choose_forward_keys(capability, keys);
  }
  return kLakBadTile;
}

int64_t lak_cuda_backward_workspace(const ZeroGateParams* params) {
  int64_t bytes = 0;
  with_architecture(*params, [&](const Architecture& a) { return bytes = a.backward_workspace(*params), int{kLakSuccess}; });
  return bytes;
}

int64_t lak_cuda_decode_workspace(const ZeroGateParams* params) {
  int64_t bytes = 0;
  with_architecture(*params, [&](const Architecture& a) { return bytes = a.decode_workspace(*params), int{kLakSuccess}; });
  return bytes;
}

const char* lak_cuda_kernels() {
  static const std::string table = [] {
    std::string lines;
    for (const Architecture* architecture : kArchitectures) architecture->list_kernels(lines);
    return lines;
  }();
  return table.c_str();
}

const char* lak_cuda_driver_needed() { return driver_needed().c_str(); }

const char* lak_cuda_architectures() { return LAK_CUDA_ARCHITECTURES; }
}
