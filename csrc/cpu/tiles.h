// Register-tiled products of small dense blocks in scratch memory, the inner loops of every kernel.
//
// Scores are kept transposed, [key][query]: softmax then works on whole vectors of queries without a horizontal step, the
// rows of K are read as they lie (one scalar broadcast per key), and P^T is again what the second product broadcasts from.
#pragma once

#include "problem.h"

namespace lak::cpu::LAK_ISA {

// Sums begin at zero in every tile and are added to what was there at the end: short chains of additions round less.
//
// A tile of kTileRows x kTileVecs accumulators: 24 of 32 registers with AVX-512, 12 of 16 otherwise; the rest holds the
// vectors of one step and a broadcast.
inline constexpr int kTileRows = 6;
#if defined(__AVX512F__)
inline constexpr int kTileVecs = 4;
#else
inline constexpr int kTileVecs = 2;
#endif

// out[r][0 .. kVecs) = sum_k a[r * lda + k] * b[k * ldb + ..]: rows of a are broadcast along k, b is read as vectors.
template <class C, int kRows, int kVecs>
struct RowByColumns {
  static void run(const C* __restrict a, int64_t lda, const C* __restrict b, int64_t ldb, int64_t depth, C* __restrict out,
                  int64_t ldo, bool add) {
    Vec<C> sum[kRows * kVecs];
    unrolled<kRows * kVecs>([&](auto i) LAK_INLINE_LAMBDA { sum[i] = Vec<C>{}; });
    for (int64_t k = 0; k < depth; ++k) {
      Vec<C> column[kVecs];
      unrolled<kVecs>([&](auto v) LAK_INLINE_LAMBDA { column[v] = load(b + k * ldb + v * kLanes<C>); });
      unrolled<kRows>([&](auto r) LAK_INLINE_LAMBDA {
        const Vec<C> x = broadcast(a[r * lda + k]);
        unrolled<kVecs>([&](auto v) LAK_INLINE_LAMBDA { sum[r * kVecs + v] += x * column[v]; });
      });
    }
    unrolled<kRows * kVecs>([&](auto i) LAK_INLINE_LAMBDA {
      C* to = out + i / kVecs * ldo + i % kVecs * kLanes<C>;
      store(to, add ? load(to) + sum[i] : sum[i]);
    });
  }
};

// out[r][0 .. kVecs) = rescale[r] * out + sum_k a[k * lda + r] * b[k * ldb + ..]: columns of a are broadcast.
template <class C, int kRows, int kVecs>
struct ColumnByColumns {
  static void run(const C* __restrict a, int64_t lda, const C* __restrict b, int64_t ldb, int64_t depth, C* __restrict out,
                  int64_t ldo, const C* rescale) {
    Vec<C> sum[kRows * kVecs];
    unrolled<kRows * kVecs>([&](auto i) LAK_INLINE_LAMBDA { sum[i] = Vec<C>{}; });
    for (int64_t k = 0; k < depth; ++k) {
      Vec<C> column[kVecs];
      unrolled<kVecs>([&](auto v) LAK_INLINE_LAMBDA { column[v] = load(b + k * ldb + v * kLanes<C>); });
      unrolled<kRows>([&](auto r) LAK_INLINE_LAMBDA {
        const Vec<C> x = broadcast(a[k * lda + r]);
        unrolled<kVecs>([&](auto v) LAK_INLINE_LAMBDA { sum[r * kVecs + v] += x * column[v]; });
      });
    }
    unrolled<kRows>([&](auto r) LAK_INLINE_LAMBDA {
      const Vec<C> factor = broadcast(rescale ? rescale[r] : C(1));
      unrolled<kVecs>([&](auto v) LAK_INLINE_LAMBDA {
        C* to = out + r * ldo + v * kLanes<C>;
        store(to, load(to) * factor + sum[r * kVecs + v]);
      });
    });
  }
};

template <class C>
using TileFunctionAdd = void (*)(const C*, int64_t, const C*, int64_t, int64_t, C*, int64_t, bool);
template <class C>
using TileFunctionScale = void (*)(const C*, int64_t, const C*, int64_t, int64_t, C*, int64_t, const C*);

// The instantiation for `rows` x `vecs`, both at least 1 and at most the tile's.
template <template <class, int, int> class Tile, class C, int kRows = kTileRows, int kVecs = kTileVecs>
LAK_INLINE auto tile_function(int64_t rows, int64_t vecs) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return tile_function<Tile, C, kRows - 1, kVecs>(rows, vecs);
  }
  if constexpr (kVecs > 1) {
    if (vecs < kVecs) return tile_function<Tile, C, kRows, kVecs - 1>(rows, vecs);
  }
  return &Tile<C, kRows, kVecs>::run;
}

// out[rows][columns] (+)= a[rows][depth] b[depth][columns]; columns are padded to whole vectors in b and out.
template <class C>
void multiply(const C* a, int64_t lda, const C* b, int64_t ldb, int64_t rows, int64_t depth, int64_t columns, C* out,
              int64_t ldo, bool add) {
  const int64_t vectors = (columns + kLanes<C> - 1) / kLanes<C>;
  for (int64_t v = 0; v < vectors; v += kTileVecs) {
    const int64_t vecs = smaller(kTileVecs, vectors - v);
    for (int64_t r = 0; r < rows; r += kTileRows) {
      const auto tile = tile_function<RowByColumns, C>(smaller(kTileRows, rows - r), vecs);
      tile(a + r * lda, lda, b + v * kLanes<C>, ldb, depth, out + r * ldo + v * kLanes<C>, ldo, add);
    }
  }
}

// One round of a transpose: of each 2 x 2 block of `half` x `half` elements in two rows, the other diagonal changes places.
template <class C>
LAK_INLINE void exchange_halves(Vec<C>& a, Vec<C>& b, int half) {
  constexpr int kLane = kLanes<C>;
  IntVec<C> low{}, high{};
  for (int lane = 0; lane < kLane; ++lane) {  // lane >= lanes selects from the second operand
    low[lane] = lane & half ? lane - half + kLane : lane;
    high[lane] = lane & half ? lane + kLane : lane + half;
  }
  const Vec<C> first = __builtin_shuffle(a, b, low);
  b = __builtin_shuffle(a, b, high);
  a = first;
}

// L x L transpose in registers: log2(L) rounds.
template <class C>
LAK_INLINE void transpose_square(Vec<C> (&rows)[kLanes<C>]) {
  constexpr int kLane = kLanes<C>;
#pragma GCC unroll 4
  for (int half = 1; half < kLane; half *= 2) {
#pragma GCC unroll 16
    for (int r = 0; r < kLane; ++r) {
      if (!(r & half)) exchange_halves<C>(rows[r], rows[r + half], half);
    }
  }
}

// to[d][r] = factor * from[r][d] for r < rows, 0 for rows <= r < padded_rows (a multiple of the vector length).
template <class T, class C>
void transpose(const T* from, int64_t stride, int64_t rows, int64_t padded_rows, int64_t depth, C factor, C* to, int64_t ldt) {
  constexpr int64_t kLane = kLanes<C>;
  for (int64_t r0 = 0; r0 < padded_rows; r0 += kLane) {
    int64_t d = 0;
    if (r0 + kLane <= rows) {
      for (; d + kLane <= depth; d += kLane) {
        Vec<C> block[kLane];
        for (int64_t r = 0; r < kLane; ++r) block[r] = load_wide(from + (r0 + r) * stride + d) * broadcast(factor);
        transpose_square<C>(block);
        for (int64_t i = 0; i < kLane; ++i) store(to + (d + i) * ldt + r0, block[i]);
      }
    }
    for (; d < depth; ++d) {
      for (int64_t r = 0; r < kLane; ++r) {
        to[d * ldt + r0 + r] = r0 + r < rows ? factor * static_cast<C>(widen(from[(r0 + r) * stride + d])) : C(0);
      }
    }
  }
}

// Rows as the compute type with the tail of each padded by zeros; a row of floats that needs neither is used in place.
template <class T, class C>
struct Rows {
  const C* data;
  int64_t stride;
};

template <class T, class C>
LAK_INLINE void widen_row(const T* from, int64_t depth, int64_t padded, C* to) {
  constexpr int64_t kLane = kLanes<C>;
  int64_t d = 0;
  for (; d + kLane <= depth; d += kLane) store(to + d, load_wide(from + d));
  for (; d < padded; ++d) to[d] = d < depth ? static_cast<C>(widen(from[d])) : C(0);
}

template <class T, class C>
Rows<T, C> dense_rows(const T* from, int64_t stride, int64_t rows, int64_t depth, C* scratch) {
  const int64_t padded = round_up(depth, kLanes<C>);
  if constexpr (sizeof(T) == sizeof(C)) {
    if (padded == depth) return {reinterpret_cast<const C*>(from), stride};
  }
  for (int64_t r = 0; r < rows; ++r) widen_row(from + r * stride, depth, padded, scratch + r * padded);
  return {scratch, padded};
}

template <class T, class C>
LAK_INLINE void narrow_row(const C* from, C factor, int64_t depth, T* to) {
  constexpr int64_t kLane = kLanes<C>;
  int64_t d = 0;
  for (; d + kLane <= depth; d += kLane) store_narrow(to + d, load(from + d) * broadcast(factor));
  for (; d < depth; ++d) narrow(from[d] * factor, to[d]);
}

}  // namespace lak::cpu::LAK_ISA
