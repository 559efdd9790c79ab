// The ops on CUDA tensors. LibTorch stable ABI only.
#include <torch/csrc/stable/accelerator.h>

#include "current_stream.h"
#include "interface.h"
#include "op/bind.h"
#include "op/library_name.h"

// The test of the ops on the emulator, whose tensors are the CPU's, says CPU.
#ifndef LAK_DISPATCH_KEY
#define LAK_DISPATCH_KEY CUDA
#endif

namespace lak {
namespace {

class CudaBackend {
 public:
  // The current device is the tensor's own while this lives. torch's guard gives the device back without making a context on one
  // that this process does not use, which cudaSetDevice would do.
  explicit CudaBackend(const Tensor& query) : guard_(query.get_device_index()) {
    const int32_t code = lak_cuda_current_stream(query.get_device_index(), &stream_);
    if (code == 0) return;
    const char* problem = lak_cuda_torch_problem();
    fail("llama_adapter_kernels (cuda): ", problem != nullptr ? problem : "torch gives no current stream");
  }

  // cp.async moves 16 aligned bytes: a view that begins or steps in between is copied. The copy has the strides that empty_like
  // gives for the view, so that results made like the copy are laid out as the fakes promise.
  static Tensor prepared(const Tensor& tensor) {
    const Tensor dense = with_dense_rows(tensor);
    const int64_t element = dense.element_size();
    bool fits = reinterpret_cast<uintptr_t>(dense.data_ptr()) % 16 == 0;
    for (int64_t d = 0; d + 1 < dense.dim(); ++d) fits = fits && dense.stride(d) * element % 16 == 0;
    if (fits || dense.numel() == 0) return dense;
    Tensor copy = torch::stable::empty_like(dense);
    torch::stable::copy_(copy, dense);
    return copy;
  }

  // The kernels clamp them: reading them here would wait for the device.
  static void check_values(const OpArguments&, const ZeroGateParams&) {}

  static int64_t workspace(Pass pass, const ZeroGateParams& params) {
    switch (pass) {
      case Pass::kForward: return 0;
      case Pass::kBackward: return lak_cuda_backward_workspace(&params);
      case Pass::kDecode: return lak_cuda_decode_workspace(&params);
    }
    return 0;
  }

  static TensorMemory allocate(const Tensor& query, int64_t bytes) { return tensor_memory(query, bytes); }

  void run(Pass pass, const ZeroGateParams& params) const {
    const auto launch = pass == Pass::kForward    ? lak_cuda_forward
                        : pass == Pass::kBackward ? lak_cuda_backward
                                                  : lak_cuda_decode;
    const int code = launch(&params, stream_);
    LAK_CHECK(code == kLakSuccess, "llama_adapter_kernels (cuda): ", lak_cuda_error(code));
  }

  static void zero_tail(Pass, const Tensor&, const int32_t*, const ZeroGateParams&) {}  // the launchers do

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

}  // namespace
}  // namespace lak

STABLE_TORCH_LIBRARY_IMPL(LAK_LIBRARY, LAK_DISPATCH_KEY, m) { lak::implement<lak::CudaBackend>(m); }
