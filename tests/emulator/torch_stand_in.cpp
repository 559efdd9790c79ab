// What csrc/cuda/op_cuda.cpp asks of a torch with CUDA, so that the ops run on the emulator with tensors of the CPU: the
// tensors' device, the guard that makes it the current one, and its stream. Definitions of this module come before those
// of libtorch_cpu.so, which has the same names.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "cuda_runtime.h"
#include "current_stream.h"

extern "C" {

AOTITorchError aoti_torch_get_device_type(AtenTensorHandle, int32_t* type) {
  *type = aoti_torch_device_type_cuda();
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_get_device_index(AtenTensorHandle, int32_t* index) {
  *index = emulator::device().of_tensors;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_create_device_guard(int32_t index, DeviceGuardHandle* guard) {
  auto& device = emulator::device();
  *guard = reinterpret_cast<DeviceGuardHandle>(static_cast<intptr_t>(device.current + 1));
  device.current = index;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle guard) {
  emulator::device().current = static_cast<int>(reinterpret_cast<intptr_t>(guard)) - 1;
  return AOTI_TORCH_SUCCESS;
}

int32_t lak_cuda_current_stream(int32_t device, void** stream) {
  *stream = reinterpret_cast<void*>(static_cast<intptr_t>(4096 + device));
  return emulator::device().torch_problem == nullptr ? 0 : -1;
}

const char* lak_cuda_torch_problem() { return emulator::device().torch_problem; }
}
