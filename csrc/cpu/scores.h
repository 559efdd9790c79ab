// S^T of one block of keys against one block of queries, and which of its elements count.
#pragma once

#include "tiles.h"

namespace lak::cpu::LAK_ISA {

inline constexpr int64_t kBlockQueries = 64;
inline constexpr int64_t kBlockKeys = 64;

// Key t of a block is hidden from queries m < hidden + t. Below -kBlockKeys nothing is hidden.
inline constexpr int64_t kNothingHidden = -(int64_t{1} << 40);

// out[t][m] = K[t] . Q[m] for n keys; whole vectors of queries that see none of a tile's keys are left out.
template <class T, class C>
void key_query_products(const Rows<T, C>& keys, int64_t n, const C* query_t, int64_t padded_rows, int64_t depth, int64_t hidden,
                        C* out) {
  for (int64_t t = 0; t < n; t += kTileRows) {
    const int64_t tile_rows = smaller(kTileRows, n - t);
    const int64_t m0 = smaller(larger(hidden + t, 0), padded_rows) / kLanes<C> * kLanes<C>;
    for (int64_t m = m0; m < padded_rows; m += kTileVecs * kLanes<C>) {
      const int64_t vecs = smaller(kTileVecs, (padded_rows - m) / kLanes<C>);
      tile_function<RowByColumns, C>(tile_rows, vecs)(keys.data + t * keys.stride, keys.stride, query_t + m, kBlockQueries,
                                                      depth, out + t * kBlockQueries + m, kBlockQueries, false);
    }
  }
}

// How many of n keys the last query before `queries_end` sees: later ones count as probability 0 for all before it.
LAK_INLINE int64_t seen_keys(int64_t n, int64_t queries_end, int64_t hidden) {
  return larger(0, smaller(n, queries_end - hidden));
}

// Among the lanes [m, m + lanes): true where the query sees key t.
template <class C>
LAK_INLINE auto sees(int64_t m, int64_t t, int64_t hidden) {
  Vec<C> lane;
  for (int i = 0; i < kLanes<C>; ++i) lane[i] = static_cast<C>(i);
  return lane >= broadcast(static_cast<C>(hidden + t - m));
}

// Calls f(read), where read(offset) is what an element of the mask adds to a scaled score: 0 or -inf for a bool mask.
template <class C, class F>
void with_mask_reader(const MaskView& mask, const F& f) {
  const auto widened = [&](auto type) {
    return
        [data = static_cast<const decltype(type)*>(mask.data)](int64_t offset) { return static_cast<C>(widen(data[offset])); };
  };
  switch (mask.type) {
    case MaskType::kBool: {
      const auto* data = static_cast<const uint8_t*>(mask.data);
      constexpr C kMinusInfinity = -__builtin_huge_val();
      return f([data](int64_t offset) {  // by bits: a choice between floats is not vectorised
        using Bits = std::conditional_t<sizeof(C) == 4, uint32_t, uint64_t>;
        const Bits bits = -static_cast<Bits>(data[offset] == 0) & __builtin_bit_cast(Bits, kMinusInfinity);
        return __builtin_bit_cast(C, bits);
      });
    }
    case MaskType::kFloat32: return f(widened(float{}));
    case MaskType::kBFloat16: return f(widened(BFloat16{}));
    case MaskType::kFloat16: return f(widened(Float16{}));
    case MaskType::kFloat64: return f(widened(double{}));
    case MaskType::kNone: return;
  }
}

// scores[t][m] += mask, for `rows` queries from q0 and n keys from k0: squares of the mask are transposed in registers. Where the
// mask is -inf (a bool mask: false), so is the score, whatever the key holds, NaN included. Lanes past the last query see nothing.
template <class C>
void add_mask(const MaskView& mask, int64_t b, int64_t head, int64_t q0, int64_t rows, int64_t k0, int64_t n, C* scores) {
  constexpr int64_t kLane = kLanes<C>;
  const int64_t first = b * mask.stride_batch + head * mask.stride_head + q0 * mask.stride_query + k0 * mask.stride_key;
  with_mask_reader<C>(mask, [&](const auto& read) {
    for (int64_t m = 0; m < rows; m += kLane) {
      for (int64_t t = 0; t < n; t += kLane) {
        const int64_t used_rows = smaller(kLane, rows - m), used_keys = smaller(kLane, n - t);
        const bool whole = used_keys == kLane && mask.stride_key == 1;
        Vec<C> square[kLane];
        for (int64_t r = 0; r < kLane; ++r) {
          alignas(64) C line[kLane];
          const int64_t offset = first + (m + r) * mask.stride_query + t * mask.stride_key;
          if (whole && r < used_rows) {
            for (int64_t i = 0; i < kLane; ++i) line[i] = read(offset + i);
          } else if (r < used_rows) {
            for (int64_t i = 0; i < used_keys; ++i) line[i] = read(offset + i * mask.stride_key);
            for (int64_t i = used_keys; i < kLane; ++i) line[i] = 0;
          } else {
            for (int64_t i = 0; i < kLane; ++i) line[i] = -__builtin_huge_val();
          }
          square[r] = load(line);
        }
        transpose_square<C>(square);
        for (int64_t i = 0; i < used_keys; ++i) {
          C* row = scores + (t + i) * kBlockQueries + m;
          store(row, square[i] == broadcast(C(-__builtin_huge_val())) ? square[i] : load(row) + square[i]);
        }
      }
    }
  });
}

}  // namespace lak::cpu::LAK_ISA
