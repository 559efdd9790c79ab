// The 16-bit element types of every backend, as plain bits: what widens and narrows them is the backend's own.
#pragma once

#include <cstdint>

namespace lak {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

}  // namespace lak
