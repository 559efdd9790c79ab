// The block products of forward and backward with AMX: bfloat16 in tiles of 16 x 32.
//
// Operands look as those of PairProducts do, with zeros up to whole tiles: a row that meets zeros in the summed dimension must
// hold numbers there, because NaN * 0 is NaN. Columns come from [pair][query], weights from [key][query].
#pragma once

#include "amx.h"
#include "products.h"

#if LAK_HAS_TILES
namespace lak::cpu::LAK_ISA {

// to[i][j] = from[j][i], 16 x 16; rows of `to` are kBlockQueries apart. Quarters of rows are loaded into their places: that is half
// of the transpose, and exchanges in registers, for which there is one port, do the other half.
LAK_INLINE void transpose_pair_tile(const uint32_t* from, float* to) {
#if defined(__AVX512F__)
  for (int64_t i = 0; i < kAmxRows; i += 4) {
    Vec<float> row[4];
    unrolled<4>([&](auto j) LAK_INLINE_LAMBDA {
      const auto quarter = [&](int64_t k) LAK_INLINE_LAMBDA {
        return _mm_load_si128((const __m128i*)(from + (j + 4 * k) * kAmxRows + i));
      };
      __m512i whole = _mm512_castsi128_si512(quarter(0));
      whole = _mm512_inserti32x4(whole, quarter(1), 1);
      whole = _mm512_inserti32x4(whole, quarter(2), 2);
      row[j] = (Vec<float>)_mm512_inserti32x4(whole, quarter(3), 3);
    });
    exchange_halves<float>(row[0], row[1], 1);
    exchange_halves<float>(row[2], row[3], 1);
    exchange_halves<float>(row[0], row[2], 2);
    exchange_halves<float>(row[1], row[3], 2);
    unrolled<4>([&](auto j) LAK_INLINE_LAMBDA { store(to + (i + j) * kBlockQueries, row[j]); });
  }
#else
  for (int64_t i = 0; i < kAmxRows; ++i) {
    for (int64_t j = 0; j < kAmxRows; ++j) std::memcpy(to + i * kBlockQueries + j, from + j * kAmxRows + i, 4);
  }
#endif
}

struct TileProducts {
  using Storage = BFloat16;
  using C = float;
  using Registers = TileRegisters;
  static constexpr bool kPacksWeights = true;
  static constexpr bool kCopiesDottedRows = true;
  static constexpr int64_t kLane = kLanes<C>;

  using DottedRows = PairProducts::DottedRows;
  using SummedRows = PairProducts::SummedRows;

  // As they lie in memory, or as a copy where a tile would reach past the last row or the last column.
  static DottedRows dotted_rows(const BFloat16* from, int64_t stride, int64_t rows, int64_t depth, C* scratch) {
    if (rows % kAmxRows == 0 && depth % kAmxBf16 == 0) return {from, stride};
    const int64_t padded_depth = round_up(depth, kAmxBf16), padded_rows = round_up(rows, kAmxRows);
    BFloat16* to = reinterpret_cast<BFloat16*>(scratch);
    for (int64_t r = 0; r < padded_rows; ++r) {
      const int64_t filled = r < rows ? depth : 0;
      if (filled) std::memcpy(to + r * padded_depth, from + r * stride, filled * sizeof(BFloat16));
      std::memset(to + r * padded_depth + filled, 0, (padded_depth - filled) * sizeof(BFloat16));
    }
    return {to, padded_depth};
  }

  static SummedRows summed_rows(const BFloat16* from, int64_t stride, int64_t rows, int64_t depth, C* scratch) {
    const SummedRows summed = PairProducts::summed_rows(from, stride, rows, depth, scratch);
    zero_pairs(scratch, (rows + 1) / 2, round_up(rows, kAmxBf16) / 2, summed.stride);
    return summed;
  }

  static void load_columns(const BFloat16* from, int64_t stride, int64_t rows, int64_t padded_rows, int64_t depth, C factor,
                           C* to) {
    PairProducts::load_columns(from, stride, rows, padded_rows, depth, factor, to);
    zero_pairs(to, depth / 2, round_up(depth, kAmxBf16) / 2, kBlockQueries);
  }

  static void dot(const DottedRows& keys, int64_t n, const C* columns, int64_t padded_rows, int64_t depth, int64_t hidden,
                  C factor, C* out) {
    const int64_t chunks = round_up(depth, kAmxBf16) / kAmxBf16, column_tiles = round_up(padded_rows, kAmxRows) / kAmxRows;
    for (int64_t t = 0; t < n; t += 2 * kAmxRows) {
      const int64_t row_tiles = smaller(2, (n - t + kAmxRows - 1) / kAmxRows);
      const int64_t first = smaller(larger(hidden + t, 0) / kAmxRows, column_tiles), m0 = first * kAmxRows;
      multiply_tiles({keys.data + t * keys.stride, keys.stride, kAmxRows * keys.stride, kAmxBf16}, pairs_in(columns) + m0,
                     kBlockQueries, row_tiles, column_tiles - first, chunks, out + t * kBlockQueries + m0, kBlockQueries,
                     false);
      if (factor == 1) continue;
      for (int64_t row = t; row < smaller(t + 2 * kAmxRows, n); ++row) {
        for (int64_t m = m0; m < padded_rows; m += kLane) {
          store(out + row * kBlockQueries + m, load(out + row * kBlockQueries + m) * broadcast(factor));
        }
      }
    }
  }

  // In the order in which a tile is summed: the first elements of 16 pairs, the second ones, then both.
  static ColumnDots<C> column_dots(const C* a, const C* b, int64_t depth, int64_t m) {
    ColumnDots<C> dots{};
    for (int64_t chunk = 0; chunk < depth / 2; chunk += kAmxRows) {
      Vec<C> low{}, high{};
      for (int64_t d = chunk; d < smaller(chunk + kAmxRows, depth / 2); ++d) {
        const Pairs x = load_pairs(pairs_in(a) + d * kBlockQueries + m), y = load_pairs(pairs_in(b) + d * kBlockQueries + m);
        const Vec<C> x_low = low_of(x), x_high = high_of(x), y_low = low_of(y), y_high = high_of(y);
        low += x_low * y_low;
        high += x_high * y_high;
        dots.squares += (x_low * x_low) * (y_low * y_low) + (x_high * x_high) * (y_high * y_high);
      }
      dots.sum += low + high;
    }
    return dots;
  }

  // Tiles of [query][key], in place: 32 keys of 16 queries, which were 16 floats in each of 32 rows, become 32 bfloat16 in each of
  // the first 16 of these rows. Keys past the last count as 0.
  static const C* weights_for_keys(C* weights, int64_t n, int64_t padded_rows) {
    for (int64_t t = 0; t < n; t += kAmxBf16) {
      for (int64_t m = 0; m < padded_rows; m += kAmxRows)
        transpose_weights(weights + t * kBlockQueries + m, smaller(kAmxBf16, n - t));
    }
    return weights;
  }
  static const C* weights_for_queries(const C* weights, int64_t n, int64_t padded_rows, C* packed) {
    BFloat16* to = reinterpret_cast<BFloat16*>(packed);
    narrow_weights(weights, n, padded_rows, kBlockQueries, to);
    const int64_t end = round_up(padded_rows, kAmxBf16);
    for (int64_t t = 0; end > padded_rows && t < n; ++t) {
      std::memset(to + t * kBlockQueries + padded_rows, 0, (end - padded_rows) * sizeof(BFloat16));
    }
    return packed;
  }

  static void sum_over_keys(const C* weights, const SummedRows& rows, int64_t n, int64_t queries, int64_t padded_depth,
                            int64_t hidden, const C* rescale, C* out) {
    constexpr int64_t kChunk = 2 * kAmxBf16 * kBlockQueries;  // from 32 keys to the next, in bfloat16
    for (int64_t m = 0; rescale && m < queries; ++m) {
      if (rescale[m] == 1) continue;
      C* row = out + m * padded_depth;
      for (int64_t d = 0; d < padded_depth; d += kLane) store(row + d, load(row + d) * broadcast(rescale[m]));
    }
    for (int64_t m = 0; m < queries; m += 2 * kAmxRows) {
      const int64_t end = smaller(m + 2 * kAmxRows, queries);
      const int64_t chunks = (seen_keys(n, end, hidden) + kAmxBf16 - 1) / kAmxBf16;
      multiply_tiles({reinterpret_cast<const BFloat16*>(weights + m), 2 * kBlockQueries, kAmxBf16, kChunk}, rows.pairs,
                     rows.stride, (end - m + kAmxRows - 1) / kAmxRows, padded_depth / kAmxRows, chunks, out + m * padded_depth,
                     padded_depth, true);
    }
  }

  static void sum_over_queries(const C* weights, const SummedRows& rows, int64_t first, int64_t n, int64_t queries,
                               int64_t padded_depth, int64_t hidden, C* out) {
    const BFloat16* narrow = reinterpret_cast<const BFloat16*>(weights);
    const int64_t last_queries = round_up(queries, kAmxBf16);
    for (int64_t t = 0; t < n; t += kAmxRows) {
      const int64_t m0 = larger(0, hidden + t) / kAmxBf16 * kAmxBf16;
      if (m0 >= last_queries) break;
      const TileRows from{narrow + t * kBlockQueries + m0, kBlockQueries, kAmxRows * kBlockQueries, kAmxBf16};
      const uint32_t* columns = rows.pairs + (first + m0) / 2 * rows.stride;
      const int64_t chunks = (last_queries - m0) / kAmxBf16;
      if (t + kAmxRows <= n) {
        const int64_t row_tiles = t + 2 * kAmxRows <= n ? 2 : 1;
        multiply_tiles(from, columns, rows.stride, row_tiles, padded_depth / kAmxRows, chunks, out + t * padded_depth,
                       padded_depth, true);
        t += (row_tiles - 1) * kAmxRows;
        continue;
      }
      for (int64_t d = 0; d < padded_depth; d += kAmxRows) {  // rows past the last are another's, or nobody's
        alignas(64) C sums[kAmxRows * kAmxRows];
        multiply_tiles<1, 1>(from, columns + d, rows.stride, chunks, sums, kAmxRows, false);
        for (int64_t row = t; row < n; ++row) {
          for (int64_t i = 0; i < kAmxRows; i += kLane) {
            C* to = out + row * padded_depth + d + i;
            store(to, load(to) + load(sums + (row - t) * kAmxRows + i));
          }
        }
      }
    }
  }

 private:
  static const uint32_t* pairs_in(const C* buffer) { return reinterpret_cast<const uint32_t*>(buffer); }

  static void zero_pairs(C* rows, int64_t begin, int64_t end, int64_t stride) {
    if (begin < end) std::memset(rows + begin * stride, 0, (end - begin) * stride * sizeof(C));
  }

  static void transpose_weights(C* weights, int64_t keys) {
    alignas(64) uint32_t pairs[kAmxRows * kAmxRows];  // [pair of keys][query]
    for (int64_t t = 0; t < kAmxBf16; t += 2) {
      for (int64_t m = 0; m < kAmxRows; m += kLane) {
        const C* at = weights + t * kBlockQueries + m;
        const Vec<C> low = t < keys ? load(at) : Vec<C>{}, high = t + 1 < keys ? load(at + kBlockQueries) : Vec<C>{};
        store_pairs(pairs + t / 2 * kAmxRows + m, to_pairs(low, high));
      }
    }
    asm volatile("" ::: "memory");  // through memory indeed, not by exchanges of the compiler's making
    transpose_pair_tile(pairs, weights);
  }
};

}  // namespace lak::cpu::LAK_ISA
#endif
