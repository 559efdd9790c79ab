// The op schemas, and the CPU kernels behind them. LibTorch stable ABI only: see op/arguments.h.
#include <string>
#include <tuple>

#include "cpu/cpu_kernels.h"
#include "op/arguments.h"

namespace lak {
namespace {

// Values of integer tensors are checked where reading them costs nothing, so that the kernels can trust them.
void check_lengths(const int32_t* lengths, const char* name, int64_t batch, int64_t limit) {
  if (lengths == nullptr) return;
  for (int64_t b = 0; b < batch; ++b) {
    LAK_CHECK(lengths[b] >= 0 && lengths[b] <= limit, name, ": expected values from 0 to ", limit, ", got ", lengths[b],
              " at position ", b);
  }
}

void check_cu_seqlens(const int32_t* cu_seqlens, const char* name, const char* longest_name, const ZeroGateParams& p,
                      int64_t total, int64_t longest) {
  if (cu_seqlens == nullptr) return;
  LAK_CHECK(cu_seqlens[0] == 0, name, ": expected to begin with 0, got ", cu_seqlens[0]);
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t length = static_cast<int64_t>(cu_seqlens[b + 1]) - cu_seqlens[b];
    LAK_CHECK(length >= 0, name, ": expected increasing offsets, got ", cu_seqlens[b + 1], " after ", cu_seqlens[b]);
    LAK_CHECK(length <= longest, longest_name, ": expected at least ", length, ", the length of sequence ", b, ", got ",
              longest);
  }
  LAK_CHECK(cu_seqlens[p.batch] <= total, name, ": expected to end within the ", total, " packed tokens, got ",
            cu_seqlens[p.batch]);
}

void check_values(const OpArguments& arguments, const ZeroGateParams& p) {
  check_lengths(p.key_start, "key_start", p.batch, p.seq_k);
  check_lengths(p.key_end, "key_end", p.batch, p.seq_k);
  check_cu_seqlens(p.cu_seqlens_q, "cu_seqlens_q", "max_seqlen_q", p, p.total_q, arguments.max_seqlen_q);
  check_cu_seqlens(p.cu_seqlens_k, "cu_seqlens_k", "max_seqlen_k", p, p.total_k, arguments.max_seqlen_k);
  for (int64_t b = 0; p.prefix_index != nullptr && b < p.batch; ++b) {
    LAK_CHECK(p.prefix_index[b] >= -1 && p.prefix_index[b] < p.prefix_count, "prefix_index: expected values from -1 to ",
              p.prefix_count - 1, ", got ", p.prefix_index[b], " at position ", b);
  }
}

cpu::Parallel torch_threads() {
  const auto run = [](int64_t count, void (*body)(void*, int64_t, int64_t), void* context) {
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
  };
  return {static_cast<int>(torch::stable::get_num_threads()), run};
}

void give_workspace(ZeroGateParams& params, Tensor& workspace) {
  // torch aligns CPU allocations to 64 bytes.
  params.workspace = workspace.numel() > 0 ? workspace.data_ptr() : nullptr;
}

// Rows after the last packed sequence belong to none. They become zero, so that neither an output nor a gradient holds what
// memory held before. A gradient nobody asked for is [0] and stays.
void clear_tail(const Tensor& packed, const int32_t* cu_seqlens, const ZeroGateParams& p) {
  if (cu_seqlens == nullptr || packed.dim() != 3 || cu_seqlens[p.batch] == packed.size(0)) return;
  Tensor without = packed;
  Tensor tail = torch::stable::narrow(without, 0, cu_seqlens[p.batch], packed.size(0) - cu_seqlens[p.batch]);
  torch::stable::zero_(tail);
}

std::tuple<Tensor, Tensor> forward_cpu(Tensor query, Tensor key, Tensor value, OptionalTensor prefix_key,
                                       OptionalTensor prefix_value, OptionalTensor gate, OptionalTensor attn_mask,
                                       OptionalTensor key_start, OptionalTensor key_end, OptionalTensor prefix_index,
                                       OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k, int64_t max_seqlen_q,
                                       int64_t max_seqlen_k, double scale, bool is_causal) {
  OpArguments arguments{query,   key,          value,        prefix_key,   prefix_value, gate,         attn_mask, key_start,
                        key_end, prefix_index, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale,     is_causal};
  ZeroGateParams params = arguments.params();
  check_values(arguments, params);
  const cpu::Kernels& kernels = cpu::kernels();
  const cpu::Parallel parallel = torch_threads();
  Tensor output = new_output(arguments);
  Tensor logsumexp = new_logsumexp(arguments, params);
  params.output = view_of(output);
  params.logsumexp = row_view_of(logsumexp);
  Tensor workspace = new_workspace(query, kernels.forward_workspace(params, parallel.threads));
  give_workspace(params, workspace);
  kernels.forward(params, parallel);
  clear_tail(output, params.cu_seqlens_q, params);
  return {laid_out_like(output, query), logsumexp};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward_cpu(
    Tensor doutput, Tensor query, Tensor key, Tensor value, OptionalTensor prefix_key, OptionalTensor prefix_value,
    OptionalTensor gate, Tensor output, Tensor logsumexp, OptionalTensor attn_mask, OptionalTensor key_start,
    OptionalTensor key_end, OptionalTensor prefix_index, OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k,
    int64_t max_seqlen_q, int64_t max_seqlen_k, double scale, bool is_causal, bool need_dquery, bool need_dkey_dvalue,
    bool need_dprefix, bool deterministic) {
  OpArguments arguments{query,   key,          value,        prefix_key,   prefix_value, gate,         attn_mask, key_start,
                        key_end, prefix_index, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale,     is_causal};
  ZeroGateParams params = arguments.params();
  check_values(arguments, params);
  check_backward_inputs(arguments, params, doutput, output, logsumexp);
  const cpu::Kernels& kernels = cpu::kernels();
  const cpu::Parallel parallel = torch_threads();
  params.deterministic = deterministic;  // the CPU kernels always are
  params.doutput = view_of(doutput);
  params.output = view_of(output);
  params.logsumexp = row_view_of(logsumexp);
  Gradients gradients = new_gradients(arguments, params, need_dquery, need_dkey_dvalue, need_dprefix);
  Tensor workspace = new_workspace(query, kernels.backward_workspace(params, parallel.threads));
  give_workspace(params, workspace);
  kernels.backward(params, parallel);
  clear_tail(gradients.query, params.cu_seqlens_q, params);
  clear_tail(gradients.key, params.cu_seqlens_k, params);
  clear_tail(gradients.value, params.cu_seqlens_k, params);
  const auto prefix = [](const Tensor& gradient, const OptionalTensor& input) {
    return input ? laid_out_like(gradient, *input) : gradient;
  };
  return {laid_out_like(gradients.query, query),        laid_out_like(gradients.key, key),
          laid_out_like(gradients.value, value),        prefix(gradients.prefix_key, prefix_key),
          prefix(gradients.prefix_value, prefix_value), gradients.gate};
}

Tensor decode_cpu(Tensor query, Tensor key_cache, Tensor value_cache, OptionalTensor prefix_key, OptionalTensor prefix_value,
                  OptionalTensor gate, OptionalTensor key_start, OptionalTensor key_end, OptionalTensor prefix_index,
                  double scale, bool is_causal) {
  OpArguments arguments{query,     key_cache, value_cache,  prefix_key,   prefix_value, gate, std::nullopt,
                        key_start, key_end,   prefix_index, std::nullopt, std::nullopt, 0,    0,
                        scale,     is_causal};
  ZeroGateParams params = arguments.params();
  check_values(arguments, params);
  const cpu::Kernels& kernels = cpu::kernels();
  const cpu::Parallel parallel = torch_threads();
  Tensor output = new_output(arguments);
  params.output = view_of(output);
  Tensor workspace = new_workspace(query, kernels.decode_workspace(params, parallel.threads));
  give_workspace(params, workspace);
  kernels.decode(params, parallel);
  return laid_out_like(output, query);
}

std::string cpu_instruction_set() { return cpu::isa_name(cpu::kernels().isa); }

void force_cpu_instruction_set(std::string name) { cpu::force_isa(name); }

std::string cpu_instruction_sets() {
  std::string names;
  for (auto isa : {cpu::Isa::kBaseline, cpu::Isa::kAvx2, cpu::Isa::kAvx512, cpu::Isa::kAvx512Bf16}) {
    if (!cpu::isa_supported(isa)) continue;
    if (!names.empty()) names += ' ';
    names += cpu::isa_name(isa);
  }
  return names;
}

}  // namespace
}  // namespace lak

STABLE_TORCH_LIBRARY(llama_adapter_kernels, m) {
  m.def(
      "forward(Tensor query, Tensor key, Tensor value, Tensor? prefix_key, Tensor? prefix_value, Tensor? gate, "
      "Tensor? attn_mask, Tensor? key_start, Tensor? key_end, Tensor? prefix_index, Tensor? cu_seqlens_q, "
      "Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, float scale, bool is_causal) -> (Tensor, Tensor)");
  m.def(
      "backward(Tensor doutput, Tensor query, Tensor key, Tensor value, Tensor? prefix_key, Tensor? prefix_value, "
      "Tensor? gate, Tensor output, Tensor logsumexp, Tensor? attn_mask, Tensor? key_start, Tensor? key_end, "
      "Tensor? prefix_index, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, "
      "float scale, bool is_causal, bool need_dquery, bool need_dkey_dvalue, bool need_dprefix, bool deterministic) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "decode(Tensor query, Tensor key_cache, Tensor value_cache, Tensor? prefix_key, Tensor? prefix_value, Tensor? gate, "
      "Tensor? key_start, Tensor? key_end, Tensor? prefix_index, float scale, bool is_causal) -> Tensor");
  m.def("cpu_instruction_set() -> str");   // the one that the next call will use
  m.def("force_cpu_instruction_set(str name) -> ()");  // for tests: from the next call on; "": as before
  m.def("cpu_instruction_sets() -> str");  // all that run here, weakest first, separated by spaces
}

STABLE_TORCH_LIBRARY_IMPL(llama_adapter_kernels, CPU, m) {
  m.impl("forward", TORCH_BOX(&lak::forward_cpu));
  m.impl("backward", TORCH_BOX(&lak::backward_cpu));
  m.impl("decode", TORCH_BOX(&lak::decode_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(llama_adapter_kernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_instruction_set", TORCH_BOX(&lak::cpu_instruction_set));
  m.impl("force_cpu_instruction_set", TORCH_BOX(&lak::force_cpu_instruction_set));
  m.impl("cpu_instruction_sets", TORCH_BOX(&lak::cpu_instruction_sets));
}
