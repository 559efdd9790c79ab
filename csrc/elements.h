// The 16-bit element types as plain bits: kernels widen and narrow through ptx/convert.h.
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
