// The ops on CPU tensors, and those that tell and force the instruction set.
#include <cstdlib>
#include <memory>
#include <string>

#include "cpu/cpu_kernels.h"
#include "op/bind.h"
#include "op/library_name.h"

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

void check_cu_seqlens(const int32_t* cu_seqlens, const char* name, const char* longest_name, const ZeroGateParams& params,
                      int64_t total, int64_t longest) {
  if (cu_seqlens == nullptr) return;
  LAK_CHECK(cu_seqlens[0] == 0, name, ": expected to begin with 0, got ", cu_seqlens[0]);
  for (int64_t b = 0; b < params.batch; ++b) {
    const int64_t length = static_cast<int64_t>(cu_seqlens[b + 1]) - cu_seqlens[b];
    LAK_CHECK(length >= 0, name, ": expected increasing offsets, got ", cu_seqlens[b + 1], " after ", cu_seqlens[b]);
    LAK_CHECK(length <= longest, longest_name, ": expected at least ", length, ", the length of sequence ", b, ", got ",
              longest);
  }
  LAK_CHECK(cu_seqlens[params.batch] <= total, name, ": expected to end within the ", total, " packed tokens, got ",
            cu_seqlens[params.batch]);
}

void check_values(const OpArguments& arguments, const ZeroGateParams& params) {
  check_lengths(params.key_start, "key_start", params.batch, params.seq_k);
  check_lengths(params.key_end, "key_end", params.batch, params.seq_k);
  check_cu_seqlens(params.cu_seqlens_q, "cu_seqlens_q", "max_seqlen_q", params, params.total_q, arguments.max_seqlen_q);
  check_cu_seqlens(params.cu_seqlens_k, "cu_seqlens_k", "max_seqlen_k", params, params.total_k, arguments.max_seqlen_k);
  for (int64_t b = 0; params.prefix_index != nullptr && b < params.batch; ++b) {
    LAK_CHECK(params.prefix_index[b] >= -1 && params.prefix_index[b] < params.prefix_count,
              "prefix_index: expected values from -1 to ", params.prefix_count - 1, ", got ", params.prefix_index[b],
              " at position ", b);
  }
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<void, Free>;

class CpuBackend {
 public:
  explicit CpuBackend(const Tensor&)
      : kernels_(cpu::kernels()), parallel_{static_cast<int>(torch::stable::get_num_threads()), over_threads} {}

  static Tensor prepared(const Tensor& tensor) { return with_dense_rows(tensor); }
  static void check_values(const OpArguments& arguments, const ZeroGateParams& params) { lak::check_values(arguments, params); }

  int64_t workspace(Pass pass, const ZeroGateParams& params) const {
    switch (pass) {
      case Pass::kForward: return kernels_.forward_workspace(params, parallel_.threads);
      case Pass::kBackward: return kernels_.backward_workspace(params, parallel_.threads);
      case Pass::kDecode: return kernels_.decode_workspace(params, parallel_.threads);
    }
    return 0;
  }

  // Not torch's allocator: a call of an op from C++ takes as long as a short decode step.
  static Memory allocate(const Tensor&, int64_t bytes) {
    constexpr int64_t kAlignment = 64;
    Memory memory(std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment));
    LAK_CHECK(memory != nullptr || bytes == 0, "llama_adapter_kernels (cpu): no memory for ", bytes, " bytes of workspace");
    return memory;
  }

  void run(Pass pass, const ZeroGateParams& params) const {
    switch (pass) {
      case Pass::kForward: return kernels_.forward(params, parallel_);
      case Pass::kBackward: return kernels_.backward(params, parallel_);
      case Pass::kDecode: return kernels_.decode(params, parallel_);
    }
  }

  // Rows after the last packed sequence belong to none: no output and no gradient may hold what memory held before. A gradient
  // nobody asked for is [0] and stays.
  static void zero_tail(Pass, const Tensor& packed, const int32_t* cu_seqlens, const ZeroGateParams& params) {
    if (cu_seqlens == nullptr || packed.dim() != 3 || cu_seqlens[params.batch] == packed.size(0)) return;
    Tensor whole = packed;
    Tensor tail = torch::stable::narrow(whole, 0, cu_seqlens[params.batch], packed.size(0) - cu_seqlens[params.batch]);
    torch::stable::zero_(tail);
  }

 private:
  static void over_threads(int64_t count, void (*body)(void*, int64_t, int64_t), void* context) {
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
  }

  const cpu::Kernels& kernels_;
  cpu::Parallel parallel_;
};

std::string cpu_instruction_set() { return cpu::isa_name(cpu::kernels().isa); }

void force_cpu_instruction_set(std::string name) { cpu::force_isa(name); }

std::string cpu_instruction_sets() {
  std::string names;
  for (auto isa : {cpu::Isa::kBaseline, cpu::Isa::kAvx2, cpu::Isa::kAvx512, cpu::Isa::kAvx512Bf16, cpu::Isa::kAmxBf16}) {
    if (!cpu::isa_supported(isa)) continue;
    if (!names.empty()) names += ' ';
    names += cpu::isa_name(isa);
  }
  return names;
}

}  // namespace
}  // namespace lak

STABLE_TORCH_LIBRARY_FRAGMENT(LAK_LIBRARY, m) {
  m.def("cpu_instruction_set() -> str");               // the one that the next call will use
  m.def("force_cpu_instruction_set(str name) -> ()");  // for tests: from the next call on; "": as before
  m.def("cpu_instruction_sets() -> str");              // all that run here, weakest first, separated by spaces
}

STABLE_TORCH_LIBRARY_IMPL(LAK_LIBRARY, CPU, m) { lak::implement<lak::CpuBackend>(m); }

STABLE_TORCH_LIBRARY_IMPL(LAK_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("cpu_instruction_set", TORCH_BOX(&lak::cpu_instruction_set));
  m.impl("force_cpu_instruction_set", TORCH_BOX(&lak::force_cpu_instruction_set));
  m.impl("cpu_instruction_sets", TORCH_BOX(&lak::cpu_instruction_sets));
}
