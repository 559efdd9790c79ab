// The namespace of the ops, torch.ops.llama_adapter_kernels. The test of the CUDA ops on the emulator has one of its own.
#pragma once

#ifndef LAK_LIBRARY
#define LAK_LIBRARY llama_adapter_kernels
#endif
