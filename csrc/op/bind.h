// The ops of one backend, made from its kernels: allocation, checks and layout of results are the same for all of them.
//
// A backend is constructed for one call and provides
//   explicit Backend(const Tensor& query)              takes what the call needs: threads, or a device and its stream
//   Tensor prepared(const Tensor&) const               the tensor in a layout that its kernels read
//   void check_values(const OpArguments&, const ZeroGateParams&) const    of integer tensors, where reading them is free
//   int64_t workspace(Pass, const ZeroGateParams&) const                  bytes
//   auto allocate(const Tensor& query, int64_t bytes) const               owns them, 64-byte aligned; get(): where they are
//   void run(Pass, const ZeroGateParams&) const
//   void zero_tail(Pass, const Tensor& packed, const int32_t* cu_seqlens, const ZeroGateParams&) const
//                                                      zeroes the tokens after the last sequence, unless run() did
#pragma once

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <utility>

#include "op/arguments.h"
#include "op/schema.h"

namespace lak {

enum class Pass { kForward, kBackward, kDecode };

// Allocates what `forward` returns. The output has query's memory layout, so that a [B, H, S, D] view of a [B, S, H, D]
// tensor gives one too and the projection after it needs no copy.
inline Tensor new_output(const OpArguments& arguments) { return torch::stable::empty_like(arguments.query); }

inline Tensor new_logsumexp(const OpArguments& arguments, const ZeroGateParams& params) {
  const auto type = accumulator_type(arguments.query);
  if (arguments.packed()) return torch::stable::new_empty(arguments.query, {params.heads_q, params.total_q}, type);
  return torch::stable::new_empty(arguments.query, {params.batch, params.heads_q, params.seq_q}, type);
}

// Scratch memory from torch's allocator, which aligns it to 64 bytes on a CPU and to 512 on a GPU.
struct TensorMemory {
  Tensor bytes;
  void* get() const { return bytes.numel() > 0 ? bytes.data_ptr() : nullptr; }
};
inline TensorMemory tensor_memory(const Tensor& query, int64_t bytes) {
  return {torch::stable::new_empty(query, {bytes}, ScalarType::Byte)};
}

inline void check_backward_inputs(const OpArguments& a, const ZeroGateParams& params, const Tensor& doutput,
                                  const Tensor& output, const Tensor& logsumexp) {
  const auto check_as_query = [&](const Tensor& tensor, const char* name) {
    check_like(tensor, name, a.query);
    if (a.packed()) check_shape(tensor, name, {params.total_q, params.heads_q, params.head_dim});
    else check_shape(tensor, name, {params.batch, params.heads_q, params.seq_q, params.head_dim});
  };
  check_as_query(doutput, "doutput");
  check_as_query(output, "output");
  LAK_CHECK(logsumexp.scalar_type() == accumulator_type(a.query) && logsumexp.device() == a.query.device(),
            "logsumexp: expected what forward returned");
  if (a.packed()) check_shape(logsumexp, "logsumexp", {params.heads_q, params.total_q});
  else check_shape(logsumexp, "logsumexp", {params.batch, params.heads_q, params.seq_q});
  LAK_CHECK(logsumexp.is_contiguous(), "logsumexp: expected a contiguous tensor");
}

struct Gradients {
  Tensor query, key, value, prefix_key, prefix_value, gate;
};

// Gradients nobody asked for are empty tensors of shape [0].
inline Gradients new_gradients(const OpArguments& a, ZeroGateParams& params, bool need_dquery, bool need_dkey_dvalue,
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
              prefix ? torch::stable::new_empty(*a.gate, {params.prefix_count, params.heads_q}, a.gate->scalar_type())
                     : absent(a.query)};
  if (need_dquery) params.dquery = view_of(g.query);
  if (need_dkey_dvalue) {
    params.dkey = view_of(g.key);
    params.dvalue = view_of(g.value);
  }
  if (prefix) {
    params.dprefix_key = view_of(g.prefix_key);
    params.dprefix_value = view_of(g.prefix_value);
    params.dgate = g.gate.data_ptr();
  }
  return g;
}

template <class Backend>
void run(const Backend& backend, Pass pass, ZeroGateParams& params, const Tensor& query) {
  const auto memory = backend.allocate(query, backend.workspace(pass, params));
  params.workspace = memory.get();
  backend.run(pass, params);
}

template <class Backend>
std::tuple<Tensor, Tensor> forward(OpArguments arguments) {
  const Tensor query = arguments.query;  // the caller's, whose strides the output promises
  const Backend backend(query);
  ZeroGateParams params = arguments.params([&](const Tensor& tensor) { return backend.prepared(tensor); });
  backend.check_values(arguments, params);
  Tensor output = new_output(arguments), logsumexp = new_logsumexp(arguments, params);
  params.output = view_of(output);
  params.logsumexp = row_view_of(logsumexp);
  run(backend, Pass::kForward, params, query);
  backend.zero_tail(Pass::kForward, output, params.cu_seqlens_q, params);
  return {laid_out_like(output, query), logsumexp};
}

using SixGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class Backend>
SixGradients backward(Tensor doutput, OpArguments arguments, Tensor output, const Tensor& logsumexp, bool need_dquery,
                      bool need_dkey_dvalue, bool need_dprefix, bool deterministic) {
  const Inputs inputs = arguments;  // the caller's, whose strides the gradients promise
  const Backend backend(inputs.query);
  ZeroGateParams params = arguments.params([&](const Tensor& tensor) { return backend.prepared(tensor); });
  backend.check_values(arguments, params);
  check_backward_inputs(arguments, params, doutput, output, logsumexp);
  params.deterministic = deterministic;
  params.doutput = view_of(doutput = backend.prepared(doutput));
  params.output = view_of(output = backend.prepared(output));
  params.logsumexp = row_view_of(logsumexp);
  Gradients gradients = new_gradients(arguments, params, need_dquery, need_dkey_dvalue, need_dprefix);
  run(backend, Pass::kBackward, params, inputs.query);
  backend.zero_tail(Pass::kBackward, gradients.query, params.cu_seqlens_q, params);
  backend.zero_tail(Pass::kBackward, gradients.key, params.cu_seqlens_k, params);
  backend.zero_tail(Pass::kBackward, gradients.value, params.cu_seqlens_k, params);
  const auto prefix = [](const Tensor& gradient, const OptionalTensor& input) {
    return input ? laid_out_like(gradient, *input) : gradient;
  };
  return {laid_out_like(gradients.query, inputs.query),        laid_out_like(gradients.key, inputs.key),
          laid_out_like(gradients.value, inputs.value),        prefix(gradients.prefix_key, inputs.prefix_key),
          prefix(gradients.prefix_value, inputs.prefix_value), gradients.gate};
}

template <class Backend>
Tensor decode(OpArguments arguments) {
  const Tensor query = arguments.query;
  const Backend backend(query);
  ZeroGateParams params = arguments.params([&](const Tensor& tensor) { return backend.prepared(tensor); });
  backend.check_values(arguments, params);
  Tensor output = new_output(arguments);
  params.output = view_of(output);
  run(backend, Pass::kDecode, params, query);
  return laid_out_like(output, query);
}

// The functions that torch calls, with the parameters of the schemas.
template <class Backend, class InputTypes = Inputs::Types, class OptionTypes = Options::Types>
struct Ops;

template <class Backend, class... InputTypes, class... OptionTypes>
struct Ops<Backend, std::tuple<InputTypes...>, std::tuple<OptionTypes...>> {
  static std::tuple<Tensor, Tensor> forward(InputTypes... inputs, OptionTypes... options) {
    return lak::forward<Backend>({{std::move(inputs)...}, {std::move(options)...}});
  }

  static SixGradients backward(Tensor doutput, InputTypes... inputs, Tensor output, Tensor logsumexp, OptionTypes... options,
                               bool need_dquery, bool need_dkey_dvalue, bool need_dprefix, bool deterministic) {
    return lak::backward<Backend>(std::move(doutput), {{std::move(inputs)...}, {std::move(options)...}}, std::move(output),
                                  logsumexp, need_dquery, need_dkey_dvalue, need_dprefix, deterministic);
  }

  static Tensor decode(InputTypes... inputs, OptionalTensor key_start, OptionalTensor key_end, OptionalTensor prefix_index,
                       double scale, bool is_causal) {
    Options options{};
    options.key_start = std::move(key_start);
    options.key_end = std::move(key_end);
    options.prefix_index = std::move(prefix_index);
    options.scale = scale;
    options.is_causal = is_causal;
    return lak::decode<Backend>({{std::move(inputs)...}, std::move(options)});
  }

  static_assert(takes(&Ops::forward, schema_of("forward")));
  static_assert(takes(&Ops::backward, schema_of("backward")));
  static_assert(takes(&Ops::decode, schema_of("decode")));
};

template <class Backend>
void implement(torch::stable::detail::StableLibrary& library) {
  library.impl("forward", TORCH_BOX(&Ops<Backend>::forward));
  library.impl("backward", TORCH_BOX(&Ops<Backend>::backward));
  library.impl("decode", TORCH_BOX(&Ops<Backend>::decode));
}

}  // namespace lak
