// The block products of forward and backward, in the form that storage type and CPU allow.
//
// Forward and backward are written once, over one of three sets of products:
//   FloatProducts  operands as floats (or doubles), widened where storage is narrower;
//   PairProducts   bfloat16 in pairs along the summed dimension, for CPUs with vdpbf16ps (pairs.h);
//   TileProducts   the same in tile registers, for CPUs with AMX (amx_products.h).
//
// All know four forms of an operand. A block of queries is transposed into columns, [head_dim][query], for products along
// head_dim; the rows they meet there (K, V) are `dotted`. Rows that are summed up with weights (V; K, Q and dO in the
// backward pass) are `summed`. Weights lie [key][query]; a sum over keys and a sum over queries may each want them packed.
#pragma once

#include "pairs.h"
#include "scores.h"

namespace lak::cpu::LAK_ISA {

// Dot products, and the sums of the squares of what was added up.
template <class C>
struct ColumnDots {
  Vec<C> sum, squares;
};

template <class T>
struct FloatProducts {
  using Storage = T;
  using C = Compute<T>;
  using Operand = Rows<T, C>;
  struct Registers {};  // what a task has to set up before it multiplies
  static constexpr bool kPacksWeights = false;
  static constexpr bool kCopiesDottedRows = false;  // apart from what summed_rows writes

  static Operand dotted_rows(const T* from, int64_t stride, int64_t rows, int64_t depth, C* scratch) {
    return dense_rows<T, C>(from, stride, rows, depth, scratch);
  }
  static Operand summed_rows(const T* from, int64_t stride, int64_t rows, int64_t depth, C* scratch) {
    return dense_rows<T, C>(from, stride, rows, depth, scratch);
  }

  // Columns of `rows` queries times `factor`; zeros up to padded_rows.
  static void load_columns(const T* from, int64_t stride, int64_t rows, int64_t padded_rows, int64_t depth, C factor, C* to) {
    transpose(from, stride, rows, padded_rows, depth, factor, to, kBlockQueries);
  }

  // out[t][m] = factor * rows[t] . columns[m] for n keys. Here the columns have been multiplied by the factor.
  static void dot(const Operand& keys, int64_t n, const C* columns, int64_t padded_rows, int64_t depth, int64_t hidden, C,
                  C* out) {
    key_query_products(keys, n, columns, padded_rows, depth, hidden, out);
  }

  // Column by column the dot products of two blocks of columns, for the queries [m, m + lanes).
  static ColumnDots<C> column_dots(const C* a, const C* b, int64_t depth, int64_t m) {
    ColumnDots<C> dots{};
    for (int64_t d = 0; d < depth; ++d) {
      const Vec<C> x = load(a + d * kBlockQueries + m), y = load(b + d * kBlockQueries + m);
      dots.sum += x * y;
      dots.squares += (x * x) * (y * y);  // not (x * y) twice: that product is to be part of a multiply-add, as in `dot`
    }
    return dots;
  }

  static const C* weights_for_keys(C* weights, int64_t, int64_t) { return weights; }
  static const C* weights_for_queries(C* weights, int64_t, int64_t, C*) { return weights; }

  // out[m] = rescale[m] * out[m] + sum_t weights[t][m] rows[t]; query m sees keys up to m - hidden.
  static void sum_over_keys(const C* weights, const Operand& rows, int64_t n, int64_t queries, int64_t padded_depth,
                            int64_t hidden, const C* rescale, C* out) {
    for (int64_t m = 0; m < queries; m += kTileRows) {
      const int64_t tile_rows = smaller(kTileRows, queries - m), seen = seen_keys(n, m + tile_rows, hidden);
      for (int64_t d = 0; d < padded_depth; d += kTileVecs * kLanes<C>) {
        const int64_t vecs = smaller(kTileVecs, (padded_depth - d) / kLanes<C>);
        tile_function<ColumnByColumns, C>(tile_rows, vecs)(weights + m, kBlockQueries, rows.data + d, rows.stride, seen,
                                                           out + m * padded_depth + d, padded_depth,
                                                           rescale ? rescale + m : nullptr);
      }
    }
  }

  // out[t] += sum over the queries m that see key t of weights[t][m] * rows[first + m].
  static void sum_over_queries(const C* weights, const Operand& rows, int64_t first, int64_t n, int64_t queries,
                               int64_t padded_depth, int64_t hidden, C* out) {
    for (int64_t t = 0; t < n; t += kTileRows) {
      const int64_t tile_rows = smaller(kTileRows, n - t), m0 = smaller(queries, larger(0, hidden + t));
      multiply(weights + t * kBlockQueries + m0, kBlockQueries, rows.data + (first + m0) * rows.stride, rows.stride, tile_rows,
               queries - m0, padded_depth, out + t * padded_depth, padded_depth, true);
    }
  }
};

#if LAK_HAS_PAIRS
// head_dim is even. Weights are rounded to bfloat16, sums are float32.
struct PairProducts {
  using Storage = BFloat16;
  using C = float;
  struct Registers {};
  static constexpr bool kPacksWeights = true;
  static constexpr bool kCopiesDottedRows = false;
  static constexpr int64_t kLane = kLanes<C>;

  struct DottedRows {  // as they lie in memory
    const BFloat16* data;
    int64_t stride;
  };
  struct SummedRows {  // [row / 2][column], two rows in each element
    const uint32_t* pairs;
    int64_t stride;
  };

  static DottedRows dotted_rows(const BFloat16* from, int64_t stride, int64_t, int64_t, C*) { return {from, stride}; }
  static SummedRows summed_rows(const BFloat16* from, int64_t stride, int64_t rows, int64_t depth, C* scratch) {
    const int64_t padded_depth = round_up(depth, kLane);
    uint32_t* pairs = reinterpret_cast<uint32_t*>(scratch);
    interleave_rows(from, stride, rows, depth, padded_depth, pairs);
    return {pairs, padded_depth};
  }

  // Columns are [head_dim / 2][query] pairs; the factor comes later.
  static void load_columns(const BFloat16* from, int64_t stride, int64_t rows, int64_t padded_rows, int64_t depth, C, C* to) {
    transpose_pairs(from, stride, rows, padded_rows, depth, reinterpret_cast<uint32_t*>(to), kBlockQueries);
  }

  static void dot(const DottedRows& keys, int64_t n, const C* columns, int64_t padded_rows, int64_t depth, int64_t hidden,
                  C factor, C* out) {
    for (int64_t t = 0; t < n; t += kTileRows) {
      const int64_t tile_rows = smaller(kTileRows, n - t);
      const int64_t m0 = smaller(larger(hidden + t, 0), padded_rows) / kLane * kLane;
      for (int64_t m = m0; m < padded_rows; m += kTileVecs * kLane) {
        const int64_t vecs = smaller(kTileVecs, (padded_rows - m) / kLane);
        pair_tile_function<PairRowByColumns>(tile_rows, vecs)(keys.data + t * keys.stride, keys.stride, pairs_in(columns) + m,
                                                              kBlockQueries, depth / 2, factor, out + t * kBlockQueries + m,
                                                              kBlockQueries, false);
      }
    }
  }

  static ColumnDots<C> column_dots(const C* a, const C* b, int64_t depth, int64_t m) {
    ColumnDots<C> dots{};
    for (int64_t d = 0; d < depth / 2; ++d) {
      const Pairs x = load_pairs(pairs_in(a) + d * kBlockQueries + m), y = load_pairs(pairs_in(b) + d * kBlockQueries + m);
      dots.sum = dot_pairs(dots.sum, x, y);
      dots.squares += square(low_of(x)) * square(low_of(y)) + square(high_of(x)) * square(high_of(y));
    }
    return dots;
  }

  // [key / 2][query] pairs of keys, in place.
  static const C* weights_for_keys(C* weights, int64_t n, int64_t padded_rows) {
    pack_rows_in_pairs(weights, n, padded_rows, kBlockQueries);
    return weights;
  }
  // [key][query] bfloat16 in `packed`, so that two queries are one pair.
  static const C* weights_for_queries(const C* weights, int64_t n, int64_t padded_rows, C* packed) {
    narrow_weights(weights, n, padded_rows, kBlockQueries, reinterpret_cast<BFloat16*>(packed));
    return packed;
  }

  static void sum_over_keys(const C* weights, const SummedRows& rows, int64_t n, int64_t queries, int64_t padded_depth,
                            int64_t hidden, const C* rescale, C* out) {
    for (int64_t m = 0; m < queries; m += kTileRows) {
      const int64_t tile_rows = smaller(kTileRows, queries - m);
      const int64_t pairs = (seen_keys(n, m + tile_rows, hidden) + 1) / 2;
      for (int64_t d = 0; d < padded_depth; d += kTileVecs * kLane) {
        const int64_t vecs = smaller(kTileVecs, (padded_depth - d) / kLane);
        pair_tile_function<PairColumnByColumns>(tile_rows, vecs)(pairs_in(weights) + m, kBlockQueries, rows.pairs + d,
                                                                 rows.stride, pairs, out + m * padded_depth + d, padded_depth,
                                                                 rescale ? rescale + m : nullptr);
      }
    }
  }

  // Weights of a query that does not see a key, or does not exist, are 0: pairs may begin before and end after those that do.
  static void sum_over_queries(const C* weights, const SummedRows& rows, int64_t first, int64_t n, int64_t queries,
                               int64_t padded_depth, int64_t hidden, C* out) {
    const BFloat16* narrow_weights = reinterpret_cast<const BFloat16*>(weights);
    for (int64_t t = 0; t < n; t += kTileRows) {
      const int64_t tile_rows = smaller(kTileRows, n - t), m0 = smaller(queries, larger(0, hidden + t)) / 2 * 2;
      for (int64_t d = 0; d < padded_depth; d += kTileVecs * kLane) {
        const int64_t vecs = smaller(kTileVecs, (padded_depth - d) / kLane);
        pair_tile_function<PairRowByColumns>(tile_rows, vecs)(
            narrow_weights + t * kBlockQueries + m0, kBlockQueries, rows.pairs + (first + m0) / 2 * rows.stride + d,
            rows.stride, (queries - m0 + 1) / 2, C(1), out + t * padded_depth + d, padded_depth, true);
      }
    }
  }

 private:
  static Vec<C> square(Vec<C> x) { return x * x; }
  static const uint32_t* pairs_in(const C* buffer) { return reinterpret_cast<const uint32_t*>(buffer); }
};
#endif

}  // namespace lak::cpu::LAK_ISA
