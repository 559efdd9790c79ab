// From torch tensors to ZeroGateParams: the checks every C++ backend shares, done once, at the op boundary.
// Written against the LibTorch stable ABI, so that one shared object serves every torch >= 2.11.
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

inline std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t d = 0; d < tensor.dim(); ++d) text += (d ? ", " : "") + std::to_string(tensor.size(d));
  return text + "]";
}

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
  bool same = tensor.dim() == static_cast<int64_t>(expected.size());
  std::string text = "[";
  int64_t d = 0;
  for (int64_t size : expected) {
    same = same && tensor.size(d) == size;
    text += (d++ ? ", " : "") + std::to_string(size);
  }
  LAK_CHECK(same, name, ": expected shape ", text, "], got ", shape_of(tensor));
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
    default: fail("attn_mask: expected bool or a floating dtype, got ", dtype_of(mask));
  }
  return {mask.const_data_ptr(), mask.stride(0), mask.stride(1), mask.stride(2), mask.stride(3), type};
}

// The arguments of `forward`, in schema order. Holds copies made by with_dense_rows alive for as long as params is used.
struct OpArguments {
  Tensor query, key, value;
  OptionalTensor prefix_key, prefix_value, gate, attn_mask, key_start, key_end, prefix_index, cu_seqlens_q, cu_seqlens_k;
  int64_t max_seqlen_q, max_seqlen_k;
  double scale;
  bool is_causal;

  bool packed() const { return cu_seqlens_q.has_value(); }

  // Checks everything that does not need the values of an integer tensor, and fills all but the outputs.
  ZeroGateParams params() {
    const int64_t rank = packed() ? 3 : 4;
    LAK_CHECK(cu_seqlens_q.has_value() == cu_seqlens_k.has_value(), "cu_seqlens_q, cu_seqlens_k: expected both or neither");
    LAK_CHECK(query.dim() == rank, "query: expected ", rank, " dimensions, got shape ", shape_of(query));
    LAK_CHECK(key.dim() == rank, "key: expected ", rank, " dimensions, got shape ", shape_of(key));

    ZeroGateParams p{};
    p.dtype = data_type_of(query, "query");
    p.scale = scale;
    p.is_causal = is_causal;
    p.heads_q = query.size(1);
    p.heads_kv = key.size(1);
    p.head_dim = query.size(rank - 1);
    p.total_q = query.size(rank - 3 + (packed() ? 0 : 1));
    p.total_k = key.size(rank - 3 + (packed() ? 0 : 1));
    if (packed()) {
      LAK_CHECK(cu_seqlens_q->dim() == 1 && cu_seqlens_q->size(0) >= 1, "cu_seqlens_q: expected shape [batch + 1], got ",
                shape_of(*cu_seqlens_q));
      LAK_CHECK(max_seqlen_q >= 0, "max_seqlen_q: expected >= 0, got ", max_seqlen_q);
      LAK_CHECK(max_seqlen_k >= 0, "max_seqlen_k: expected >= 0, got ", max_seqlen_k);
      LAK_CHECK(!key_start && !key_end, "key_start, key_end: not used with packed sequences");
      LAK_CHECK(!attn_mask, "attn_mask: not used with packed sequences");
      p.batch = cu_seqlens_q->size(0) - 1;
      // A generous bound costs nothing: no sequence is longer than all of them together.
      p.seq_q = std::min(max_seqlen_q, p.total_q);
      p.seq_k = std::min(max_seqlen_k, p.total_k);
      check_shape(key, "key", {p.total_k, p.heads_kv, p.head_dim});
      check_shape(value, "value", {p.total_k, p.heads_kv, p.head_dim});
    } else {
      p.batch = query.size(0);
      p.seq_q = p.total_q;
      p.seq_k = p.total_k;
      check_shape(key, "key", {p.batch, p.heads_kv, p.seq_k, p.head_dim});
      check_shape(value, "value", {p.batch, p.heads_kv, p.seq_k, p.head_dim});
    }
    LAK_CHECK(p.head_dim >= 1, "query: expected head_dim >= 1, got shape ", shape_of(query));
    LAK_CHECK(p.heads_q >= 1, "query: expected at least one head, got shape ", shape_of(query));
    LAK_CHECK(p.heads_kv >= 1 && p.heads_q % p.heads_kv == 0, "key: expected a number of heads that divides the ", p.heads_q,
              " of query, got ", p.heads_kv);
    check_like(key, "key", query);
    check_like(value, "value", query);
    p.query = view_of(query = with_dense_rows(query));
    p.key = view_of(key = with_dense_rows(key));
    p.value = view_of(value = with_dense_rows(value));

    fill_prefix(p);
    if (attn_mask) {
      LAK_CHECK(attn_mask->device() == query.device(), "attn_mask: expected the device of query");
      check_shape(*attn_mask, "attn_mask", {p.batch, p.heads_q, p.seq_q, p.seq_k});
      p.mask = mask_view_of(*attn_mask);
    }
    p.key_start = int32_data(key_start, "key_start", p.batch, query);
    p.key_end = int32_data(key_end, "key_end", p.batch, query);
    p.cu_seqlens_q = int32_data(cu_seqlens_q, "cu_seqlens_q", p.batch + 1, query);
    p.cu_seqlens_k = int32_data(cu_seqlens_k, "cu_seqlens_k", p.batch + 1, query);
    return p;
  }

 private:
  void fill_prefix(ZeroGateParams& p) {
    LAK_CHECK(prefix_key.has_value() == prefix_value.has_value() && prefix_key.has_value() == gate.has_value(),
              "prefix_key, prefix_value, gate: expected all three or none");
    if (!prefix_key) {
      LAK_CHECK(!prefix_index, "prefix_index: expected a prefix to choose from");
      return;
    }
    LAK_CHECK(prefix_key->dim() == 4, "prefix_key: expected 4 dimensions, got shape ", shape_of(*prefix_key));
    p.prefix_count = prefix_key->size(0);
    p.prefix_length = prefix_key->size(2);
    check_shape(*prefix_key, "prefix_key", {p.prefix_count, p.heads_kv, p.prefix_length, p.head_dim});
    check_shape(*prefix_value, "prefix_value", {p.prefix_count, p.heads_kv, p.prefix_length, p.head_dim});
    check_shape(*gate, "gate", {p.prefix_count, p.heads_q});
    check_like(*prefix_key, "prefix_key", query);
    check_like(*prefix_value, "prefix_value", query);
    LAK_CHECK(gate->scalar_type() == accumulator_type(query), "gate: expected float32, or float64 for a float64 query, got ",
              dtype_of(*gate));
    LAK_CHECK(gate->device() == query.device(), "gate: expected the device of query");
    if (prefix_index) {
      LAK_CHECK(p.prefix_count >= 1, "prefix_key: expected at least one entry, got shape ", shape_of(*prefix_key));
    } else {
      LAK_CHECK(p.prefix_count == 1 || p.prefix_count == p.batch, "prefix_key: expected a first dimension of 1 or ", p.batch,
                " (one per sequence), or a prefix_index into the table; got shape ", shape_of(*prefix_key));
    }
    p.prefix_key = view_of(*(prefix_key = with_dense_rows(*prefix_key)));
    p.prefix_value = view_of(*(prefix_value = with_dense_rows(*prefix_value)));
    p.prefix_index = int32_data(prefix_index, "prefix_index", p.batch, query);
    p.gate = gate->const_data_ptr();
    p.gate_stride_prefix = gate->stride(0);
    p.gate_stride_head = gate->stride(1);
  }
};

// Allocates what `forward` returns. The output has query's memory layout, so that a [B, H, S, D] view of a [B, S, H, D]
// tensor gives one too and the projection after it needs no copy.
inline Tensor new_output(const OpArguments& arguments) { return torch::stable::empty_like(arguments.query); }

inline Tensor new_logsumexp(const OpArguments& arguments, const ZeroGateParams& p) {
  const auto type = accumulator_type(arguments.query);
  if (arguments.packed()) return torch::stable::new_empty(arguments.query, {p.heads_q, p.total_q}, type);
  return torch::stable::new_empty(arguments.query, {p.batch, p.heads_q, p.seq_q}, type);
}

inline Tensor new_workspace(const Tensor& query, int64_t bytes) {
  return torch::stable::new_empty(query, {bytes}, ScalarType::Byte);
}

inline void check_backward_inputs(const OpArguments& a, const ZeroGateParams& p, Tensor& doutput, Tensor& output,
                                  const Tensor& logsumexp) {
  const auto check_as_query = [&](const Tensor& tensor, const char* name) {
    check_like(tensor, name, a.query);
    if (a.packed()) check_shape(tensor, name, {p.total_q, p.heads_q, p.head_dim});
    else check_shape(tensor, name, {p.batch, p.heads_q, p.seq_q, p.head_dim});
  };
  check_as_query(doutput, "doutput");
  check_as_query(output, "output");
  LAK_CHECK(logsumexp.scalar_type() == accumulator_type(a.query) && logsumexp.device() == a.query.device(),
            "logsumexp: expected what forward returned");
  if (a.packed()) check_shape(logsumexp, "logsumexp", {p.heads_q, p.total_q});
  else check_shape(logsumexp, "logsumexp", {p.batch, p.heads_q, p.seq_q});
  LAK_CHECK(logsumexp.is_contiguous(), "logsumexp: expected a contiguous tensor");
  doutput = with_dense_rows(doutput);
  output = with_dense_rows(output);
}

struct Gradients {
  Tensor query, key, value, prefix_key, prefix_value, gate;
};

// Gradients nobody asked for are empty tensors of shape [0].
inline Gradients new_gradients(const OpArguments& a, ZeroGateParams& p, bool need_dquery, bool need_dkey_dvalue,
                               bool need_dprefix) {
  const auto absent = [&](const Tensor& like) { return torch::stable::new_empty(like, {0}, like.scalar_type()); };
  const auto like = [&](bool needed, const Tensor& tensor) {
    return needed ? torch::stable::empty_like(tensor) : absent(tensor);
  };
  const bool prefix = need_dprefix && a.prefix_key.has_value();
  Gradients g{like(need_dquery, a.query),
              like(need_dkey_dvalue, a.key),
              like(need_dkey_dvalue, a.value),
              prefix ? torch::stable::empty_like(*a.prefix_key) : absent(a.query),
              prefix ? torch::stable::empty_like(*a.prefix_value) : absent(a.query),
              prefix ? torch::stable::new_empty(*a.gate, {p.prefix_count, p.heads_q}, a.gate->scalar_type()) : absent(a.query)};
  if (need_dquery) p.dquery = view_of(g.query);
  if (need_dkey_dvalue) {
    p.dkey = view_of(g.key);
    p.dvalue = view_of(g.value);
  }
  if (prefix) {
    p.dprefix_key = view_of(g.prefix_key);
    p.dprefix_value = view_of(g.prefix_value);
    p.dgate = g.gate.data_ptr();
  }
  return g;
}

}  // namespace lak
