#pragma once

#include <string>

namespace lak::sm80 {

// Appends a line for each kernel with a matrix product in it, as lak_cuda_kernels describes them.
void list_kernels(std::string& lines);

}  // namespace lak::sm80
