// Vectors of float and double for one instruction set, and exp2.
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

// f(0), ..., f(kCount - 1) with constants. An array of vectors indexed by nothing but constants lives in registers from end to
// end; indexed by a loop's counter it is stored before the loop and after it, even where the compiler unrolls that loop.
template <int kCount, class F>
LAK_INLINE void unrolled(const F& f) {
  [&]<int... I>(std::integer_sequence<int, I...>)
      LAK_INLINE_LAMBDA { (f(std::integral_constant<int, I>{}), ...); }(std::make_integer_sequence<int, kCount>{});
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

// exp(x) = 2^(x log2(e)). The difference of scores comes before this factor: it is exact near the maximum.
inline constexpr double kLog2E = 1.4426950408889634;

// 2^x for x <= 0 (softmax arguments): exactly 1 for 0, 0 for -inf and wherever 2^x is below the normal numbers, NaN for every
// NaN. x = n + f with |f| <= 1/2: 2^f by a polynomial (float: minimax of degree 6, error below 1 ulp; double: Taylor of degree
// 13, below 1.5 ulp), times a power of two made from bits. Only n becomes bits; f, which is NaN where x is, goes through
// arithmetic alone. For x > 0, which nobody may use, the result is any number.
//
// Adding round_shift rounds x to an integer and leaves n + the exponent's bias in the lowest bits. The clamp is where that is
// 0, which as an exponent means the number 0.
LAK_INLINE Vec<float> exp2_nonpositive(Vec<float> x) {
  using V = Vec<float>;
#if defined(__AMX_BF16__)
  // Whatever this build computes is rounded to bfloat16 soon, and its products are fast: so fewer instructions. 2^f for f in [0, 1)
  // as 1 + f p(f), relative error 1.5e-7; the instructions for f and for 2^n know infinities and NaN.
  const V fraction = (V)_mm512_reduce_ps((__m512)x, 0x09);
  V q = broadcast(1.86713007e-3f);
  q = q * fraction + 9.01703032e-3f;
  q = q * fraction + 5.57999131e-2f;
  q = q * fraction + 2.4016445e-1f;
  q = q * fraction + 6.93151312e-1f;
  q = q * fraction + 1.0f;
  // Below 2^-126 it is 0: a denormal would cost a hundred cycles.
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return (V)_mm512_maskz_scalef_ps(normal, (__m512)q, (__m512)x);
#else
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
#endif
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

template <class C>
LAK_INLINE C horizontal_sum(Vec<C> v) {
  C sum = 0;
  for (int i = 0; i < kLanes<C>; ++i) sum += v[i];
  return sum;
}

}  // namespace lak::cpu::LAK_ISA
