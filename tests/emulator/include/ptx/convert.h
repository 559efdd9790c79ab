// Emulates csrc/cuda/ptx/convert.h in integer arithmetic and the compiler's own half-precision type.
#pragma once

#include "cuda_runtime.h"
#include "elements.h"

namespace lak::ptx {

inline float widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float widen(Float16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, exponent = x.bits >> 10 & 31, fraction = x.bits & 0x3ffu;
  if (exponent == 0) {  // zero and denormal numbers
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  const uint32_t bits = sign | (exponent == 31 ? 255u : exponent + 112) << 23 | fraction << 13;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float widen(float x) { return x; }

template <class T>
T narrow(float x);

template <>
inline BFloat16 narrow<BFloat16>(float x) {  // round to nearest even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
}
template <>
inline Float16 narrow<Float16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const float magnitude = std::fabs(x);
  if (x != x) return {0x7fff};
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  if (magnitude < 0x1p-14f) {  // denormal: adding 2^-1 aligns the unit in the last place with 2^-24
    const float shifted = magnitude + 0.5f;
    uint32_t shifted_bits;
    std::memcpy(&shifted_bits, &shifted, 4);
    return {static_cast<uint16_t>(sign | (shifted_bits - 0x3f000000u))};
  }
  bits &= 0x7fffffffu;
  bits += 0xfffu + (bits >> 13 & 1);
  return {static_cast<uint16_t>(sign | ((bits >> 13) - (112u << 10)))};
}
template <>
inline float narrow<float>(float x) {
  return x;
}

// Two elements in one register, `low` in the lower half.
template <class T>
uint32_t pack(float low, float high) {
  return narrow<T>(low).bits | static_cast<uint32_t>(narrow<T>(high).bits) << 16;
}

inline float exp2_fast(float x) { return std::exp2(x); }
inline float log2_fast(float x) { return std::log2(x); }

}  // namespace lak::ptx
