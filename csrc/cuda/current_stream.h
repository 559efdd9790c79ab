// torch's current stream, through the one function of its stable C interface that only a torch with CUDA has.
#pragma once

#include <cstdint>

#include "interface.h"

extern "C" {

// The current stream of a device: 0 on success. Not 0 where lak_cuda_torch_problem says why.
LAK_EXPORT int32_t lak_cuda_current_stream(int32_t device, void** stream);

// Why torch cannot be asked for its stream; nullptr when it can.
LAK_EXPORT const char* lak_cuda_torch_problem();
}
