// The emulator as a Python module: runs the launchers of csrc/cuda on memory of the CPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda_runtime.h"
#include "faults.h"
#include "interface.h"
#include "machine.h"

namespace py = pybind11;
using lak::ZeroGateParams;

namespace emulator {

Device& device() {
  static Device the_device;
  return the_device;
}

}  // namespace emulator

namespace {

lak::TensorView view(const py::dict& d, const char* name) {
  if (!d.contains(name)) return {};
  const auto t = d[name].cast<std::vector<int64_t>>();  // address, strides over batch, head, row
  return {reinterpret_cast<void*>(t.at(0)), t.at(1), t.at(2), t.at(3)};
}

template <class T>
T* address(const py::dict& d, const char* name) {
  return d.contains(name) ? reinterpret_cast<T*>(d[name].cast<int64_t>()) : nullptr;
}

ZeroGateParams params_from(const py::dict& d) {
  const auto integer = [&](const char* name) { return d[name].cast<int64_t>(); };
  ZeroGateParams p{};
  p.batch = integer("batch");
  p.heads_q = integer("heads_q");
  p.heads_kv = integer("heads_kv");
  p.head_dim = integer("head_dim");
  p.seq_q = integer("seq_q");
  p.seq_k = integer("seq_k");
  p.total_q = integer("total_q");
  p.total_k = integer("total_k");
  p.prefix_length = integer("prefix_length");
  p.prefix_count = integer("prefix_count");
  p.dtype = static_cast<lak::DataType>(integer("dtype"));
  p.scale = d["scale"].cast<double>();
  p.is_causal = static_cast<int32_t>(integer("is_causal"));
  p.deterministic = static_cast<int32_t>(integer("deterministic"));
  p.query = view(d, "query");
  p.key = view(d, "key");
  p.value = view(d, "value");
  p.prefix_key = view(d, "prefix_key");
  p.prefix_value = view(d, "prefix_value");
  p.output = view(d, "output");
  p.doutput = view(d, "doutput");
  p.dquery = view(d, "dquery");
  p.dkey = view(d, "dkey");
  p.dvalue = view(d, "dvalue");
  p.dprefix_key = view(d, "dprefix_key");
  p.dprefix_value = view(d, "dprefix_value");
  if (d.contains("gate")) {
    const auto gate = d["gate"].cast<std::vector<int64_t>>();
    p.gate = reinterpret_cast<const void*>(gate.at(0));
    p.gate_stride_prefix = gate.at(1);
    p.gate_stride_head = gate.at(2);
  }
  if (d.contains("mask")) {  // address, four strides, type
    const auto m = d["mask"].cast<std::vector<int64_t>>();
    p.mask = {reinterpret_cast<const void*>(m.at(0)), m.at(1), m.at(2), m.at(3), m.at(4), static_cast<lak::MaskType>(m.at(5))};
  }
  if (d.contains("logsumexp")) {
    const auto r = d["logsumexp"].cast<std::vector<int64_t>>();
    p.logsumexp = {reinterpret_cast<void*>(r.at(0)), r.at(1), r.at(2)};
  }
  p.key_start = address<const int32_t>(d, "key_start");
  p.key_end = address<const int32_t>(d, "key_end");
  p.cu_seqlens_q = address<const int32_t>(d, "cu_seqlens_q");
  p.cu_seqlens_k = address<const int32_t>(d, "cu_seqlens_k");
  p.prefix_index = address<const int32_t>(d, "prefix_index");
  p.dgate = address<void>(d, "dgate");
  p.workspace = address<void>(d, "workspace");
  return p;
}

}  // namespace

PYBIND11_MODULE(cuda_emulator, m) {
  m.def("register_memory", [](const std::string& name, int64_t data, uint64_t bytes, bool writable) {
    emulator::register_memory(name, reinterpret_cast<const void*>(data), bytes, writable);
  });
  m.def("forget_memory", &emulator::forget_memory);
  m.def("set_seed", &emulator::set_seed);
  m.def("counts", [] {
    auto& c = emulator::counts();
    const std::map<std::string, uint64_t> result{{"mma", c.mma},
                                                 {"ldmatrix", c.ldmatrix},
                                                 {"cp_async", c.cp_async},
                                                 {"barriers", c.barriers},
                                                 {"shared_accesses", c.shared_accesses},
                                                 {"collectives", c.collectives},
                                                 {"reductions", c.reductions},
                                                 {"reduction_sectors", c.reduction_sectors},
                                                 {"wavefronts", c.wavefronts},
                                                 {"bank_conflicts", c.bank_conflicts}};
    c = {};
    return result;
  });
  m.def("count_banks", &emulator::count_banks,
        "Whether counts() has wavefronts and bank_conflicts of shared memory, which takes time.");
  m.def("set_device",
        [](int capability, int driver_error, int code_error, int of_tensors, bool torch_works, int launches) {
    emulator::device() = {capability, static_cast<cudaError_t>(driver_error),        static_cast<cudaError_t>(code_error),
                          of_tensors, torch_works ? nullptr : "torch has no stream", launches};
  }, py::arg("capability") = 90, py::arg("driver_error") = 0, py::arg("code_error") = 0, py::arg("of_tensors") = 0,
        py::arg("torch_works") = true, py::arg("launches") = -1);
  m.def("last_launch", [] {  // (current device then, stream, current device now)
    const auto& device = emulator::device();
    return std::tuple(device.launched_on, reinterpret_cast<intptr_t>(device.launched_with), device.current);
  });
  m.def("choose_forward_keys", &lak_cuda_choose_forward_keys);
  m.def("probe", [] {
    int can_change = -1;
    const int code = lak_cuda_probe(&can_change);
    return std::pair(code, can_change != 0);
  });
  m.def("kernels", &lak_cuda_kernels);
  m.def("traffic", [] {  // of each registered memory since the last call: asked, read, written
    std::map<std::string, std::vector<uint64_t>> result;
    for (const auto& [name, t] : emulator::take_traffic()) result[name] = {t.asked, t.read, t.written};
    return result;
  });
  m.def("blocks", [] {  // of each kernel since the last call: launched, idle
    std::map<std::string, std::pair<uint64_t, uint64_t>> result;
    for (const auto& [name, b] : emulator::take_blocks()) result[name] = {b.launched, b.idle};
    return result;
  });
  m.def("error", &lak_cuda_error);
  m.def("forward", [](const py::dict& d) {
    const auto p = params_from(d);
    return lak_cuda_forward(&p, nullptr);
  });
  m.def("decode", [](const py::dict& d) {
    const auto p = params_from(d);
    return lak_cuda_decode(&p, nullptr);
  });
  m.def("decode_workspace", [](const py::dict& d) {
    const auto p = params_from(d);
    return lak_cuda_decode_workspace(&p);
  });
  m.def("backward", [](const py::dict& d) {
    const auto p = params_from(d);
    return lak_cuda_backward(&p, nullptr);
  });
  m.def("backward_workspace", [](const py::dict& d) {
    const auto p = params_from(d);
    return lak_cuda_backward_workspace(&p);
  });
  m.def("run_fault", &emulator::run_fault, "Runs the kernel with one planted fault; `name` is a function of faults.cu.");
}
