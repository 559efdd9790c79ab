// Tensors of the LibTorch stable ABI (one shared object serves every torch >= 2.11): what is checked of them, in messages that
// name the argument, what was expected and what came, and the views of them that kernels take.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "zero_gate_params.h"

namespace lak {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// A RuntimeError in Python that says what is written here; torch's own macro puts function, file and line before it.
template <class... Parts>
[[noreturn]] inline void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}
#define LAK_CHECK(condition, ...)               \
  do {                                          \
    if (!(condition)) ::lak::fail(__VA_ARGS__); \
  } while (false)

template <class Sizes>
std::string shape_text(const Sizes& sizes) {
  std::string text = "[";
  for (const int64_t size : sizes) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

inline std::string shape_of(const Tensor& tensor) { return shape_text(tensor.sizes()); }

inline std::string dtype_of(const Tensor& tensor) { return torch::headeronly::toString(tensor.scalar_type()); }

inline DataType data_type_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DataType::kFloat32;
    case ScalarType::BFloat16: return DataType::kBFloat16;
    case ScalarType::Half: return DataType::kFloat16;
    case ScalarType::Double: return DataType::kFloat64;
    default: fail(name, ": expected float32, bfloat16, float16 or float64, got ", dtype_of(tensor));
  }
}

// Sums and per-row statistics are float32, float64 for float64 inputs.
inline ScalarType accumulator_type(const Tensor& query) {
  return query.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Kernels read rows of head_dim consecutive elements; any other layout is copied here.
inline bool has_dense_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) <= 1 || tensor.stride(last) == 1;
}
inline Tensor with_dense_rows(const Tensor& tensor) {
  return has_dense_rows(tensor) ? tensor : torch::stable::contiguous(tensor);
}

// The result in the strides of empty_like(input), which the ops' fakes promise to the compiler. A copy only where the
// input was copied as well; a gradient nobody asked for ([0]) stays.
inline Tensor laid_out_like(const Tensor& result, const Tensor& input) {
  if (result.dim() != input.dim() || has_dense_rows(input)) return result;
  Tensor promised = torch::stable::empty_like(input);
  torch::stable::copy_(promised, result);
  return promised;
}

inline void check_like(const Tensor& tensor, const char* name, const Tensor& query) {
  LAK_CHECK(tensor.scalar_type() == query.scalar_type(), name, ": expected the dtype of query, ", dtype_of(query), ", got ",
            dtype_of(tensor));
  LAK_CHECK(tensor.device() == query.device(), name, ": expected the device of query");
}

inline void check_shape(const Tensor& tensor, const char* name, std::initializer_list<int64_t> expected) {
  const auto sizes = tensor.sizes();
  const bool same = std::equal(sizes.begin(), sizes.end(), expected.begin(), expected.end());
  LAK_CHECK(same, name, ": expected shape ", shape_text(expected), ", got ", shape_of(tensor));
}

inline const int32_t* int32_data(const OptionalTensor& tensor, const char* name, int64_t size, const Tensor& query) {
  if (!tensor) return nullptr;
  LAK_CHECK(tensor->scalar_type() == ScalarType::Int, name, ": expected int32, got ", dtype_of(*tensor));
  LAK_CHECK(tensor->device() == query.device(), name, ": expected the device of query");
  check_shape(*tensor, name, {size});
  LAK_CHECK(size <= 1 || tensor->stride(0) == 1, name, ": expected a contiguous tensor");
  return static_cast<const int32_t*>(tensor->const_data_ptr());
}

// [B, H, S, D], or packed [T, H, D] seen as one batch entry.
inline TensorView view_of(const Tensor& tensor) {
  TensorView view{};
  view.data = tensor.data_ptr();
  const bool packed = tensor.dim() == 3;
  view.stride_batch = packed ? 0 : tensor.stride(0);
  view.stride_head = tensor.stride(1);
  view.stride_row = packed ? tensor.stride(0) : tensor.stride(2);
  return view;
}

inline RowView row_view_of(const Tensor& tensor) {  // [B, H, S] or packed [H, T], contiguous
  const bool packed = tensor.dim() == 2;
  return {tensor.data_ptr(), packed ? 0 : tensor.stride(0), packed ? tensor.stride(0) : tensor.stride(1)};
}

inline MaskView mask_view_of(const Tensor& mask) {
  MaskType type = MaskType::kNone;
  switch (mask.scalar_type()) {
    case ScalarType::Bool: type = MaskType::kBool; break;
    case ScalarType::Float: type = MaskType::kFloat32; break;
    case ScalarType::BFloat16: type = MaskType::kBFloat16; break;
    case ScalarType::Half: type = MaskType::kFloat16; break;
    case ScalarType::Double: type = MaskType::kFloat64; break;
    default: fail("attn_mask: expected bool, float32, bfloat16, float16 or float64, got ", dtype_of(mask));
  }
  return {mask.const_data_ptr(), mask.stride(0), mask.stride(1), mask.stride(2), mask.stride(3), type};
}

}  // namespace lak
