// Vectors of float and double for one instruction set, and conversions from the storage types.
//
// This header is compiled once per instruction set, inside namespace lak::cpu::LAK_ISA, so that no function compiled for a
// newer CPU can ever be called on an older one. GCC and Clang vector extensions carry the arithmetic (they compile for
// any CPU, multiply-adds are contracted); intrinsics appear only where an extension has no word for the instruction.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef LAK_ISA
#error "LAK_ISA names the instruction set this file is compiled for"
#endif

namespace lak::cpu::LAK_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

#define LAK_INLINE inline __attribute__((always_inline))
#define LAK_INLINE_LAMBDA __attribute__((always_inline))

// f(0), ..., f(N - 1) with constants. An array of vectors indexed by nothing but constants lives in registers from end to
// end; indexed by a loop's counter it is stored before the loop and after it, even where the compiler unrolls that loop.
template <int N, class F>
LAK_INLINE void unrolled(const F& f) {
  [&]<int... I>(std::integer_sequence<int, I...>)
      LAK_INLINE_LAMBDA { (f(std::integral_constant<int, I>{}), ...); }(std::make_integer_sequence<int, N>{});
}

template <class C>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float Type __attribute__((vector_size(kVectorBytes)));
  typedef float Unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double Type __attribute__((vector_size(kVectorBytes)));
  typedef double Unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  typedef int64_t Int __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t Bits __attribute__((vector_size(kVectorBytes)));
};

template <class C>
using Vec = typename VectorOf<C>::Type;
template <class C>
using IntVec = typename VectorOf<C>::Int;
template <class C>
using BitsVec = typename VectorOf<C>::Bits;  // for arithmetic on bits: it wraps around
template <class C>
inline constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(C));

template <class C>
LAK_INLINE Vec<C> load(const C* p) {
  return *reinterpret_cast<const typename VectorOf<C>::Unaligned*>(p);
}
template <class C>
LAK_INLINE void store(C* p, Vec<C> v) {
  *reinterpret_cast<typename VectorOf<C>::Unaligned*>(p) = v;
}
template <class C>
LAK_INLINE Vec<C> broadcast(C x) {
  return x - Vec<C>{};  // a splat: x - 0 is x for every x, -0 included
}
// The same value, loaded once: the compiler would rather read it from memory again in every instruction that uses it.
template <class C>
LAK_INLINE Vec<C> in_register(Vec<C> v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__x86_64__)
  asm("" : "+x"(v));
#endif
  return v;
}
template <class C>
LAK_INLINE Vec<C> maximum(Vec<C> a, Vec<C> b) {
  return a > b ? a : b;
}

// 2^x for x <= 0 (softmax arguments): exactly 1 for 0, 0 for -inf and wherever 2^x is below the normal numbers, NaN for every
// NaN. x = n + f with |f| <= 1/2: 2^f by a polynomial (float: minimax of degree 6, error below 1 ulp; double: Taylor of degree
// 13, below 1.5 ulp), times a power of two made from bits. Only n becomes bits; f, which is NaN where x is, goes through
// arithmetic alone. For x > 0, which nobody may use, the result is any number.
//
// Adding round_shift rounds x to an integer and leaves n + the exponent's bias in the lowest bits. The clamp is where that is
// 0, which as an exponent means the number 0.
LAK_INLINE Vec<float> exp2_nonpositive(Vec<float> x) {
  using V = Vec<float>;
  const V round_shift = broadcast(12582912.0f + 127.0f);    // 1.5 * 2^23
  const V clamped = maximum<float>(broadcast(-127.0f), x);  // NaN: second operand
  const V shifted = clamped + round_shift;
  const V f = clamped - (shifted - round_shift);
  V p = broadcast(1.5353360e-4f);
  p = p * f + 1.3398875e-3f;
  p = p * f + 9.6184369e-3f;
  p = p * f + 5.5503324e-2f;
  p = p * f + 2.4022648e-1f;
  p = p * f + 6.9314718e-1f;
  const V power = (V)((IntVec<float>)shifted << 23);
  return (power * f) * p + power;
}

LAK_INLINE Vec<double> exp2_nonpositive(Vec<double> x) {
  using V = Vec<double>;
  const V round_shift = broadcast(6755399441055744.0 + 1023.0);  // 1.5 * 2^52
  const V clamped = maximum<double>(broadcast(-1023.0), x);
  const V shifted = clamped + round_shift;
  const V f = clamped - (shifted - round_shift);
  // ln(2)^k / k!; the first term left out is below 6e-18 for |f| <= 1/2
  V p = broadcast(1.3691488853904129e-12);
  p = p * f + 2.5678435993488206e-11;
  p = p * f + 4.4455382718708116e-10;
  p = p * f + 7.0549116208011233e-9;
  p = p * f + 1.0178086009239699e-7;
  p = p * f + 1.3215486790144307e-6;
  p = p * f + 1.5252733804059841e-5;
  p = p * f + 1.5403530393381608e-4;
  p = p * f + 1.3333558146428443e-3;
  p = p * f + 9.6181291076284772e-3;
  p = p * f + 5.5504108664821580e-2;
  p = p * f + 2.4022650695910071e-1;
  p = p * f + 6.9314718055994531e-1;
  const V power = (V)((IntVec<double>)shifted << 52);
  return (power * f) * p + power;
}

// ---- storage types ----
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

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
template <int HALF, class T>
LAK_INLINE auto load_half(const T* pair) {
  return load_wide(pair + HALF * sizeof(load_wide(pair)) / sizeof(load_wide(pair)[0]));
}
template <int HALF>
LAK_INLINE Vec<float> load_half(const BFloat16* pair) {
  using Unaligned = int32_t __attribute__((vector_size(kVectorBytes), aligned(2), may_alias));
  const IntVec<float> both = *reinterpret_cast<const Unaligned*>(pair);
  return (Vec<float>)(HALF == 0 ? both << 16 : both & int32_t(0xffff0000));
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

template <class C>
LAK_INLINE C horizontal_sum(Vec<C> v) {
  C sum = 0;
  for (int i = 0; i < kLanes<C>; ++i) sum += v[i];
  return sum;
}

}  // namespace lak::cpu::LAK_ISA
