// The kernels of one family of GPU architectures, as interface.cu sees them. Each family has a folder (sm80/) with tiles,
// kernels and instantiations of its own, compiled with flags of its own, and fills one of these tables.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "zero_gate_params.h"

namespace lak {

// The functions take a problem that interface.cu has checked, and return a LakCudaError. Every one of them is set.
struct Architecture {
  int least_capability;  // major * 10 + minor: the first compute capability these kernels run on
  int (*forward)(const ZeroGateParams& params, cudaStream_t stream);
  int (*backward)(const ZeroGateParams& params, cudaStream_t stream);
  int (*decode)(const ZeroGateParams& params, cudaStream_t stream);
  int64_t (*backward_workspace)(const ZeroGateParams& params);  // bytes
  int64_t (*decode_workspace)(const ZeroGateParams& params);
  int (*choose_forward_keys)(int capability, int keys);  // see lak_cuda_choose_forward_keys
  int (*probe)();                          // can the current device run code that was compiled like the kernels?
  void (*list_kernels)(std::string& lines);  // appends lines as lak_cuda_kernels describes them
};

namespace sm80 {
extern const Architecture kArchitecture;
}

}  // namespace lak
