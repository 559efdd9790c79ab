// The ops on CUDA tensors: the checks of op/arguments.h, the launchers of interface.h. LibTorch stable ABI only.
#include <cuda_runtime_api.h>

#include <tuple>

#include "interface.h"
#include "op/arguments.h"

// Part of torch's stable C interface where torch has CUDA. Weak, so that the library loads, and can be asked what it holds,
// beside a torch without.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace lak {
namespace {

// The current device is the tensors' own while this lives.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& tensor) : device_(tensor.get_device_index()) {
    cudaGetDevice(&previous_);
    if (device_ != previous_) cudaSetDevice(device_);
    void* stream = nullptr;
    LAK_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream) == 0, "no current CUDA stream");
    stream_ = stream;
  }
  ~OnDeviceOf() {
    if (device_ != previous_) cudaSetDevice(previous_);
  }
  OnDeviceOf(const OnDeviceOf&) = delete;
  OnDeviceOf& operator=(const OnDeviceOf&) = delete;
  void* stream() const { return stream_; }

 private:
  int device_, previous_ = 0;
  void* stream_ = nullptr;
};

void check_launch(int code) { LAK_CHECK(code == kLakSuccess, "llama_adapter_kernels (cuda): ", lak_cuda_error(code)); }

// cp.async moves 16 aligned bytes: a view that begins or steps in between is copied. The copy has the strides that
// empty_like gives for the view, so that results made like the copy are laid out as the fakes promise.
Tensor aligned(const Tensor& tensor) {
  const int64_t element = tensor.element_size();
  bool fits = reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0;
  for (int64_t d = 0; d + 1 < tensor.dim(); ++d) fits = fits && tensor.stride(d) * element % 16 == 0;
  if (fits || tensor.numel() == 0) return tensor;
  Tensor copy = torch::stable::empty_like(tensor);
  torch::stable::copy_(copy, tensor);
  return copy;
}

OptionalTensor aligned(const OptionalTensor& tensor) { return tensor ? OptionalTensor(aligned(*tensor)) : tensor; }

void give_workspace(ZeroGateParams& params, const Tensor& workspace) {
  params.workspace = workspace.numel() > 0 ? workspace.data_ptr() : nullptr;  // torch aligns CUDA memory to 512 bytes
}

std::tuple<Tensor, Tensor> forward_cuda(Tensor query, Tensor key, Tensor value, OptionalTensor prefix_key,
                                        OptionalTensor prefix_value, OptionalTensor gate, OptionalTensor attn_mask,
                                        OptionalTensor key_start, OptionalTensor key_end, OptionalTensor prefix_index,
                                        OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k, int64_t max_seqlen_q,
                                        int64_t max_seqlen_k, double scale, bool is_causal) {
  const OnDeviceOf device(query);
  OpArguments arguments{aligned(with_dense_rows(query)),
                        aligned(with_dense_rows(key)),
                        aligned(with_dense_rows(value)),
                        aligned(prefix_key),
                        aligned(prefix_value),
                        gate,
                        attn_mask,
                        key_start,
                        key_end,
                        prefix_index,
                        cu_seqlens_q,
                        cu_seqlens_k,
                        max_seqlen_q,
                        max_seqlen_k,
                        scale,
                        is_causal};
  ZeroGateParams params = arguments.params();
  Tensor output = new_output(arguments);
  Tensor logsumexp = new_logsumexp(arguments, params);
  params.output = view_of(output);
  params.logsumexp = row_view_of(logsumexp);
  check_launch(lak_cuda_forward(&params, device.stream()));
  return {laid_out_like(output, query), logsumexp};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward_cuda(
    Tensor doutput, Tensor query, Tensor key, Tensor value, OptionalTensor prefix_key, OptionalTensor prefix_value,
    OptionalTensor gate, Tensor output, Tensor logsumexp, OptionalTensor attn_mask, OptionalTensor key_start,
    OptionalTensor key_end, OptionalTensor prefix_index, OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k,
    int64_t max_seqlen_q, int64_t max_seqlen_k, double scale, bool is_causal, bool need_dquery, bool need_dkey_dvalue,
    bool need_dprefix, bool deterministic) {
  const OnDeviceOf device(query);
  OpArguments arguments{aligned(with_dense_rows(query)),
                        aligned(with_dense_rows(key)),
                        aligned(with_dense_rows(value)),
                        aligned(prefix_key),
                        aligned(prefix_value),
                        gate,
                        attn_mask,
                        key_start,
                        key_end,
                        prefix_index,
                        cu_seqlens_q,
                        cu_seqlens_k,
                        max_seqlen_q,
                        max_seqlen_k,
                        scale,
                        is_causal};
  ZeroGateParams params = arguments.params();
  check_backward_inputs(arguments, params, doutput, output, logsumexp);
  params.deterministic = deterministic;
  doutput = aligned(doutput);
  output = aligned(output);
  params.doutput = view_of(doutput);
  params.output = view_of(output);
  params.logsumexp = row_view_of(logsumexp);
  Gradients gradients = new_gradients(arguments, params, need_dquery, need_dkey_dvalue, need_dprefix);
  Tensor workspace = new_workspace(query, lak_cuda_backward_workspace(&params));
  give_workspace(params, workspace);
  check_launch(lak_cuda_backward(&params, device.stream()));
  const auto prefix = [](const Tensor& gradient, const OptionalTensor& input) {
    return input ? laid_out_like(gradient, *input) : gradient;
  };
  return {laid_out_like(gradients.query, query),        laid_out_like(gradients.key, key),
          laid_out_like(gradients.value, value),        prefix(gradients.prefix_key, prefix_key),
          prefix(gradients.prefix_value, prefix_value), gradients.gate};
}

Tensor decode_cuda(Tensor query, Tensor key_cache, Tensor value_cache, OptionalTensor prefix_key, OptionalTensor prefix_value,
                   OptionalTensor gate, OptionalTensor key_start, OptionalTensor key_end, OptionalTensor prefix_index,
                   double scale, bool is_causal) {
  const OnDeviceOf device(query);
  OpArguments arguments{aligned(with_dense_rows(query)),
                        aligned(with_dense_rows(key_cache)),
                        aligned(with_dense_rows(value_cache)),
                        aligned(prefix_key),
                        aligned(prefix_value),
                        gate,
                        std::nullopt,
                        key_start,
                        key_end,
                        prefix_index,
                        std::nullopt,
                        std::nullopt,
                        0,
                        0,
                        scale,
                        is_causal};
  ZeroGateParams params = arguments.params();
  Tensor output = new_output(arguments);
  params.output = view_of(output);
  Tensor workspace = new_workspace(query, lak_cuda_decode_workspace(&params));
  give_workspace(params, workspace);
  check_launch(lak_cuda_decode(&params, device.stream()));
  return laid_out_like(output, query);
}

}  // namespace
}  // namespace lak

STABLE_TORCH_LIBRARY_IMPL(llama_adapter_kernels, CUDA, m) {
  m.impl("forward", TORCH_BOX(&lak::forward_cuda));
  m.impl("backward", TORCH_BOX(&lak::backward_cuda));
  m.impl("decode", TORCH_BOX(&lak::decode_cuda));
}
