// Elements as they are stored: conversions to and from the types that sums are kept in, one by one and by vectors.
#pragma once

#include "../elements.h"
#include "../zero_gate_params.h"
#include "simd.h"

namespace lak::cpu::LAK_ISA {

LAK_INLINE float widen(float x) { return x; }
LAK_INLINE double widen(double x) { return x; }
LAK_INLINE float widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
LAK_INLINE float widen(Float16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  // Shift the 15 value bits into place and correct the exponent bias by a multiplication, which handles denormals too.
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  float value;
  std::memcpy(&value, &magnitude, 4);
  value *= 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (magnitude >= (0x7c00u << 13)) bits = magnitude | 0x7f800000u;  // infinity and NaN
  bits |= sign;
  std::memcpy(&value, &bits, 4);
  return value;
#endif
}

LAK_INLINE void narrow(float x, float& to) { to = x; }
LAK_INLINE void narrow(double x, double& to) { to = x; }
LAK_INLINE void narrow(float x, BFloat16& to) {  // round to nearest even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  to.bits = x != x ? uint16_t{0x7fc0} : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
LAK_INLINE void narrow(float x, Float16& to) {
#if defined(__F16C__)
  to.bits = static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  uint32_t half;
  if (bits >= 0x47800000u) {  // too large, infinity or NaN
    half = bits > 0x7f800000u ? 0x7e00u : 0x7c00u;
  } else if (bits < 0x38800000u) {  // denormal: the addition rounds at the right bit
    float value;
    std::memcpy(&value, &bits, 4);
    value += 0.5f;
    std::memcpy(&half, &value, 4);
    half -= 0x3f000000u;
  } else {
    half = (bits + 0xfffu + ((bits >> 13) & 1u) - 0x38000000u) >> 13;
  }
  to.bits = static_cast<uint16_t>(sign | half);
#endif
}

// The type sums are kept in for a storage type.
template <class T>
struct ComputeOf {
  using Type = float;
};
template <>
struct ComputeOf<double> {
  using Type = double;
};
template <class T>
using Compute = typename ComputeOf<T>::Type;

// What rounding to a storage type may change a number by, relative to it.
template <class T>
inline constexpr Compute<T> kRounding = 0x1p-24f;
template <>
inline constexpr float kRounding<BFloat16> = 0x1p-8f;
template <>
inline constexpr float kRounding<Float16> = 0x1p-11f;
template <>
inline constexpr double kRounding<double> = 0x1p-53;

// kLanes consecutive elements of storage as one vector.
LAK_INLINE Vec<float> load_wide(const float* p) { return load(p); }
LAK_INLINE Vec<double> load_wide(const double* p) { return load(p); }
LAK_INLINE Vec<float> load_wide(const BFloat16* p) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  Vec<float> v{};
  for (int i = 0; i < kLanes<float>; ++i) v[i] = widen(p[i]);
  return v;
#endif
}
LAK_INLINE Vec<float> load_wide(const Float16* p) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  Vec<float> v{};
  for (int i = 0; i < kLanes<float>; ++i) v[i] = widen(p[i]);
  return v;
#endif
}

// 2 kLanes consecutive elements are a pair of vectors, in the order that costs least: bfloat16 by even and odd places (one shift
// or one mask of a whole vector of storage), everything else as it comes. Sums over all elements need no order; place_in_pair
// tells where in the pair element i is.
template <int kHalf, class T>
LAK_INLINE auto load_half(const T* pair) {
  return load_wide(pair + kHalf * sizeof(load_wide(pair)) / sizeof(load_wide(pair)[0]));
}
template <int kHalf>
LAK_INLINE Vec<float> load_half(const BFloat16* pair) {
  using Unaligned = int32_t __attribute__((vector_size(kVectorBytes), aligned(2), may_alias));
  const IntVec<float> both = *reinterpret_cast<const Unaligned*>(pair);
  return (Vec<float>)(kHalf == 0 ? both << 16 : both & int32_t(0xffff0000));
}
template <class T, class C>
constexpr int64_t place_in_pair(int64_t i) {
  return std::is_same_v<T, BFloat16> ? i % 2 * kLanes<C> + i / 2 : i;
}

LAK_INLINE void store_narrow(float* p, Vec<float> v) { store(p, v); }
LAK_INLINE void store_narrow(double* p, Vec<double> v) { store(p, v); }
LAK_INLINE void store_narrow(Float16* p, Vec<float> v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int i = 0; i < kLanes<float>; ++i) narrow(v[i], p[i]);
#endif
}
// The bits of bfloat16, rounded to nearest even, in the upper half of each element (the lower one holds anything). NaN stays NaN.
LAK_INLINE BitsVec<float> round_to_bfloat16(Vec<float> v) {
  using Bits = BitsVec<float>;
  const Bits bits = (Bits)v, rounded = bits + 0x7fffu + (bits >> 16 & 1u);
  return v == v ? rounded : Bits{} + 0x7fc00000u;
}
LAK_INLINE void store_narrow(BFloat16* p, Vec<float> v) {
  const BitsVec<float> rounded = round_to_bfloat16(v) >> 16;
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)rounded));
#else
  for (int i = 0; i < kLanes<float>; ++i) p[i].bits = static_cast<uint16_t>(rounded[i]);
#endif
}

// f(an element of the type).
template <class F>
auto with_storage_type(DataType dtype, const F& f) {
  switch (dtype) {
    case DataType::kBFloat16: return f(BFloat16{});
    case DataType::kFloat16: return f(Float16{});
    case DataType::kFloat64: return f(double{});
    case DataType::kFloat32: break;
  }
  return f(float{});
}

}  // namespace lak::cpu::LAK_ISA
