#pragma once

#include <string>

namespace emulator {

// Raises the emulator's report of what is wrong with the kernel called `name`. `memory` is a buffer of 64 floats.
void run_fault(const std::string& name, uint64_t memory);

}  // namespace emulator
