// Tiles of products of bfloat16 in pairs along the summed dimension, for CPUs with vdpbf16ps: twice the products of the
// float32 tiles for each instruction and each load. A pair is two bfloat16 in 32 bits, the first one low. Sums are float32.
#pragma once

#include "tiles.h"

#if defined(__AVX512BF16__) || defined(LAK_BF16_STAND_IN)
#define LAK_HAS_PAIRS 1

namespace lak::cpu::LAK_ISA {

using Pairs = IntVec<float>;

LAK_INLINE Pairs load_pairs(const uint32_t* p) { return (Pairs)load(reinterpret_cast<const float*>(p)); }
LAK_INLINE void store_pairs(uint32_t* p, Pairs v) { store(reinterpret_cast<float*>(p), (Vec<float>)v); }

LAK_INLINE Vec<float> low_of(Pairs pairs) { return (Vec<float>)(pairs << 16); }
LAK_INLINE Vec<float> high_of(Pairs pairs) { return (Vec<float>)(pairs & static_cast<int32_t>(0xffff0000u)); }

// sum + low * low + high * high. The instruction rounds after each product and flushes denormals. The stand-in, which tests
// use on a CPU without it, keeps denormals: a difference of 1e-38.
LAK_INLINE Vec<float> dot_pairs(Vec<float> sum, Pairs a, Pairs b) {
#if defined(LAK_BF16_STAND_IN)
  sum += high_of(a) * high_of(b);
  return sum + low_of(a) * low_of(b);
#else
  return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#endif
}

// Two vectors of weights to pairs, rounded to nearest even. The instruction turns denormals to 0, as those that multiply them do.
LAK_INLINE Pairs to_pairs(Vec<float> low, Vec<float> high) {
#if defined(__AVX512BF16__)
  alignas(64) static constexpr uint16_t kInTurn[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return (Pairs)_mm512_permutexvar_epi16(_mm512_load_si512(kInTurn), (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
#else
  return (Pairs)(round_to_bfloat16(low) >> 16 | (round_to_bfloat16(high) & 0xffff0000u));
#endif
}

// A vector's elements of each of two rows: pairs of what is above one another. A widened bfloat16 is its bits, 16 up.
LAK_INLINE Pairs interleave(const BFloat16* low, const BFloat16* high) {
#if defined(__AVX512F__)
  const __m512i upper = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)high));
  return (Pairs)_mm512_or_si512(_mm512_slli_epi32(upper, 16), _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)low)));
#else
  return (((Pairs)load_wide(low) >> 16) & 0xffff) | (Pairs)load_wide(high);
#endif
}

// Neighbours in memory, which begin at any element.
LAK_INLINE Pairs load_neighbours(const BFloat16* p) {
  using Unaligned = int32_t __attribute__((vector_size(kVectorBytes), aligned(2), may_alias));
  return *reinterpret_cast<const Unaligned*>(p);
}
LAK_INLINE uint32_t pair_at(const BFloat16* p) {
  uint32_t pair;
  std::memcpy(&pair, p, 4);
  return pair;
}

// to[d / 2][r] = the pair (d, d + 1) of row r, zeros for rows <= r < padded_rows. depth is even.
inline void transpose_pairs(const BFloat16* from, int64_t stride, int64_t rows, int64_t padded_rows, int64_t depth,
                            uint32_t* to, int64_t ldt) {
  constexpr int64_t kLane = kLanes<float>;
  for (int64_t r0 = 0; r0 < padded_rows; r0 += kLane) {
    int64_t d = 0;
    if (r0 + kLane <= rows) {
      for (; d + 2 * kLane <= depth; d += 2 * kLane) {
        Vec<float> block[kLane];
        for (int64_t r = 0; r < kLane; ++r) block[r] = (Vec<float>)load_neighbours(from + (r0 + r) * stride + d);
        transpose_square<float>(block);
        for (int64_t i = 0; i < kLane; ++i) store_pairs(to + (d / 2 + i) * ldt + r0, (Pairs)block[i]);
      }
    }
    for (; d < depth; d += 2) {
      for (int64_t r = 0; r < kLane; ++r) to[d / 2 * ldt + r0 + r] = r0 + r < rows ? pair_at(from + (r0 + r) * stride + d) : 0;
    }
  }
}

// to[t / 2][d] = the pair of rows t, t + 1, zeros past the last row and column.
inline void interleave_rows(const BFloat16* from, int64_t stride, int64_t rows, int64_t depth, int64_t padded_depth,
                            uint32_t* to) {
  constexpr int64_t kLane = kLanes<float>;
  for (int64_t t = 0; t < rows; t += 2) {
    const BFloat16 *low = from + t * stride, *high = low + stride;
    const bool has_high = t + 1 < rows;
    int64_t d = 0;
    for (; has_high && d + kLane <= depth; d += kLane) store_pairs(to + d, interleave(low + d, high + d));
    for (; d < padded_depth; ++d) {
      to[d] = d < depth ? low[d].bits | (has_high ? static_cast<uint32_t>(high[d].bits) << 16 : 0u) : 0u;
    }
    to += padded_depth;
  }
}

// Rows of [n][ld] become pairs of rows, [ceil(n / 2)][ld], in place.
inline void pack_rows_in_pairs(float* weights, int64_t n, int64_t columns, int64_t ld) {
  uint32_t* to = reinterpret_cast<uint32_t*>(weights);
  for (int64_t t = 0; t < n; t += 2) {
    for (int64_t m = 0; m < columns; m += kLanes<float>) {
      const Vec<float> low = load(weights + t * ld + m), high = t + 1 < n ? load(weights + (t + 1) * ld + m) : Vec<float>{};
      store_pairs(to + t / 2 * ld + m, to_pairs(low, high));
    }
  }
}

// The first `columns` (whole vectors) of [n][ld], rounded to bfloat16.
inline void narrow_weights(const float* weights, int64_t n, int64_t columns, int64_t ld, BFloat16* to) {
  for (int64_t t = 0; t < n; ++t) {
    for (int64_t m = 0; m < columns; m += kLanes<float>) {
#if defined(__AVX512BF16__)
      _mm256_storeu_si256((__m256i*)(to + t * ld + m), (__m256i)_mm512_cvtneps_pbh((__m512)load(weights + t * ld + m)));
#else
      store_narrow(to + t * ld + m, load(weights + t * ld + m));
#endif
    }
  }
}

// out[r][0 .. kVecs) (+)= factor * sum_k a[r][k] b[k][..] over `pairs` pairs along k: two neighbours in a row of a are one.
template <int kRows, int kVecs>
struct PairRowByColumns {
  static void run(const BFloat16* a, int64_t lda, const uint32_t* b, int64_t ldb, int64_t pairs, float factor, float* out,
                  int64_t ldo, bool add) {
    Vec<float> sum[kRows * kVecs];
    unrolled<kRows * kVecs>([&](auto i) LAK_INLINE_LAMBDA { sum[i] = Vec<float>{}; });
    for (int64_t k = 0; k < pairs; ++k) {
      Pairs column[kVecs];
      unrolled<kVecs>([&](auto v) LAK_INLINE_LAMBDA { column[v] = load_pairs(b + k * ldb + v * kLanes<float>); });
      unrolled<kRows>([&](auto r) LAK_INLINE_LAMBDA {
        const Pairs x = Pairs{} + static_cast<int32_t>(pair_at(a + r * lda + 2 * k));
        unrolled<kVecs>([&](auto v) LAK_INLINE_LAMBDA { sum[r * kVecs + v] = dot_pairs(sum[r * kVecs + v], x, column[v]); });
      });
    }
    unrolled<kRows * kVecs>([&](auto i) LAK_INLINE_LAMBDA {
      float* to = out + i / kVecs * ldo + i % kVecs * kLanes<float>;
      const Vec<float> product = sum[i] * broadcast(factor);
      store(to, add ? load(to) + product : product);
    });
  }
};

// out[r][0 .. kVecs) = rescale[r] * out + sum over `pairs` pairs of rows of a and b, columns of a broadcast.
template <int kRows, int kVecs>
struct PairColumnByColumns {
  static void run(const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb, int64_t pairs, float* out, int64_t ldo,
                  const float* rescale) {
    Vec<float> sum[kRows * kVecs];
    unrolled<kRows * kVecs>([&](auto i) LAK_INLINE_LAMBDA { sum[i] = Vec<float>{}; });
    for (int64_t k = 0; k < pairs; ++k) {
      Pairs column[kVecs];
      unrolled<kVecs>([&](auto v) LAK_INLINE_LAMBDA { column[v] = load_pairs(b + k * ldb + v * kLanes<float>); });
      unrolled<kRows>([&](auto r) LAK_INLINE_LAMBDA {
        const Pairs x = Pairs{} + static_cast<int32_t>(a[k * lda + r]);
        unrolled<kVecs>([&](auto v) LAK_INLINE_LAMBDA { sum[r * kVecs + v] = dot_pairs(sum[r * kVecs + v], x, column[v]); });
      });
    }
    unrolled<kRows>([&](auto r) LAK_INLINE_LAMBDA {
      const Vec<float> factor = broadcast(rescale ? rescale[r] : 1.0f);
      unrolled<kVecs>([&](auto v) LAK_INLINE_LAMBDA {
        float* to = out + r * ldo + v * kLanes<float>;
        store(to, load(to) * factor + sum[r * kVecs + v]);
      });
    });
  }
};

// The instantiation for `rows` x `vecs`, as tile_function of tiles.h.
template <template <int, int> class Tile, int kRows = kTileRows, int kVecs = kTileVecs>
LAK_INLINE auto pair_tile_function(int64_t rows, int64_t vecs) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return pair_tile_function<Tile, kRows - 1, kVecs>(rows, vecs);
  }
  if constexpr (kVecs > 1) {
    if (vecs < kVecs) return pair_tile_function<Tile, kRows, kVecs - 1>(rows, vecs);
  }
  return &Tile<kRows, kVecs>::run;
}

}  // namespace lak::cpu::LAK_ISA

#else
#define LAK_HAS_PAIRS 0
#endif
