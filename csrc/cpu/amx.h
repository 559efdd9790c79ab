// The eight tile registers of AMX: 16 rows of 64 bytes each, 16 x 16 float32 or 16 x 32 bfloat16. One instruction multiplies
// two of them and adds the product to a third, 16384 multiply-adds of bfloat16.
//
// multiply_add<C, A, B>: C[m][n] += sum over the pairs k of A[m][k] . B[k][n]. A holds rows, 16 pairs of neighbours in each; B
// holds pairs of what is above one another, as pairs.h lays them out. Sums are float32; the instruction adds up the first
// elements of all pairs and the second elements apart, then both to C, rounds after each step and flushes denormals.
#pragma once

#include "pairs.h"

#if defined(__AMX_BF16__) || defined(LAK_TILES)  // LAK_TILES: the stand-in
#define LAK_HAS_TILES 1

namespace lak::cpu::LAK_ISA {

inline constexpr int64_t kAmxRows = 16;  // of a tile; and its float32, or pairs of bfloat16, in each row
inline constexpr int64_t kAmxBf16 = 32;  // bfloat16 in each row

#if defined(LAK_BF16_STAND_IN)
// Tests on processors without the instructions: their definitions, one by one.
struct Tile {
  uint32_t element[kAmxRows][kAmxRows];
};
inline thread_local Tile stand_in_tiles[8];

class TileRegisters {};

template <int kRegister>
LAK_INLINE void tile_zero() {
  stand_in_tiles[kRegister] = Tile{};
}
template <int kRegister>
LAK_INLINE void tile_load(const void* from, int64_t stride_bytes) {
  for (int64_t r = 0; r < kAmxRows; ++r) {
    std::memcpy(stand_in_tiles[kRegister].element[r], static_cast<const char*>(from) + r * stride_bytes, 64);
  }
}
template <int kRegister>
LAK_INLINE void tile_store(void* to, int64_t stride_bytes) {
  for (int64_t r = 0; r < kAmxRows; ++r) {
    std::memcpy(static_cast<char*>(to) + r * stride_bytes, stand_in_tiles[kRegister].element[r], 64);
  }
}
template <int kSum, int kRows, int kColumns>
void multiply_add() {
  const auto half = [](uint32_t pair, int which) { return widen(BFloat16{static_cast<uint16_t>(pair >> 16 * which)}); };
  for (int64_t m = 0; m < kAmxRows; ++m) {
    float sums[2][kAmxRows] = {};
    for (int64_t k = 0; k < kAmxRows; ++k) {
      const uint32_t a = stand_in_tiles[kRows].element[m][k];
      for (int64_t n = 0; n < kAmxRows; ++n) {
        const uint32_t b = stand_in_tiles[kColumns].element[k][n];
        for (int which = 0; which < 2; ++which) sums[which][n] += half(a, which) * half(b, which);
      }
    }
    for (int64_t n = 0; n < kAmxRows; ++n) {
      float sum;
      std::memcpy(&sum, &stand_in_tiles[kSum].element[m][n], 4);
      sum += sums[0][n] + sums[1][n];
      std::memcpy(&stand_in_tiles[kSum].element[m][n], &sum, 4);
    }
  }
}
#else
// While it lives, the thread has eight whole tiles. Others in this process (oneDNN) shape them as they like, so every task says
// anew what it wants; released registers cost nothing when the system switches threads.
class TileRegisters {
 public:
  TileRegisters() {
    struct alignas(64) Shapes {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    static_assert(sizeof(Shapes) == 64);
    static constexpr Shapes kShapes;
    asm volatile("ldtilecfg %0" ::"m"(kShapes));
  }
  ~TileRegisters() { asm volatile("tilerelease"); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

// In assembly: GCC's intrinsics do not tell the compiler that a load reads memory.
template <int kRegister>
LAK_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kRegister));
}
template <int kRegister>
LAK_INLINE void tile_load(const void* from, int64_t stride_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride_bytes), "i"(kRegister) : "memory");
}
template <int kRegister>
LAK_INLINE void tile_store(void* to, int64_t stride_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride_bytes), "i"(kRegister) : "memory");
}
template <int kSum, int kRows, int kColumns>
LAK_INLINE void multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kRows), "i"(kColumns));
}
#endif

// Where the rows of tiles lie, in elements: how far it is to the next row, the next 16 rows, and the next 32 elements of a row.
struct TileRows {
  const BFloat16* data;
  int64_t row, rows16, chunk;
};

// out (+)= rows x columns, of kRows x kColumns tiles, at most 2 x 2, over `chunks` tiles along the summed dimension. `columns` is
// [pair][column].
template <int kRows, int kColumns>
void multiply_tiles(const TileRows& rows, const uint32_t* columns, int64_t ldc, int64_t chunks, float* out, int64_t ldo,
                    bool add) {
  // Registers 0 to 3 hold sums, 4 and 5 rows, 6 and 7 columns.
  unrolled<kRows * kColumns>([&](auto i) LAK_INLINE_LAMBDA {
    if (add) {
      tile_load<i>(out + i / kColumns * kAmxRows * ldo + i % kColumns * kAmxRows, ldo * 4);
    } else {
      tile_zero<i>();
    }
  });
  for (int64_t k = 0; k < chunks; ++k) {
    unrolled<kColumns>([&](auto n)
                           LAK_INLINE_LAMBDA { tile_load<6 + n>(columns + k * kAmxRows * ldc + n * kAmxRows, ldc * 4); });
    unrolled<kRows>([&](auto m) LAK_INLINE_LAMBDA {
      tile_load<4 + m>(rows.data + k * rows.chunk + m * rows.rows16, rows.row * 2);
      unrolled<kColumns>([&](auto n) LAK_INLINE_LAMBDA { multiply_add<m * kColumns + n, 4 + m, 6 + n>(); });
    });
  }
  unrolled<kRows * kColumns>(
      [&](auto i) LAK_INLINE_LAMBDA { tile_store<i>(out + i / kColumns * kAmxRows * ldo + i % kColumns * kAmxRows, ldo * 4); });
}

// The same for any number of tiles.
inline void multiply_tiles(const TileRows& rows, const uint32_t* columns, int64_t ldc, int64_t row_tiles, int64_t column_tiles,
                           int64_t chunks, float* out, int64_t ldo, bool add) {
  for (int64_t m = 0; m < row_tiles; m += 2) {
    for (int64_t n = 0; n < column_tiles; n += 2) {
      const bool two_rows = m + 1 < row_tiles, two_columns = n + 1 < column_tiles;
      const auto multiply = two_rows      ? two_columns ? multiply_tiles<2, 2> : multiply_tiles<2, 1>
                            : two_columns ? multiply_tiles<1, 2>
                                          : multiply_tiles<1, 1>;
      multiply({rows.data + m * rows.rows16, rows.row, rows.rows16, rows.chunk}, columns + n * kAmxRows, ldc, chunks,
               out + m * kAmxRows * ldo + n * kAmxRows, ldo, add);
    }
  }
}

}  // namespace lak::cpu::LAK_ISA

#else
#define LAK_HAS_TILES 0
#endif
