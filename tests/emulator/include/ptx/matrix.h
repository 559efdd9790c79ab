// Emulates csrc/cuda/ptx/matrix.h: ldmatrix, stmatrix and mma.sync, executed for the whole warp once all lanes are there.
#pragma once

#include "convert.h"
#include "cuda_runtime.h"

namespace lak::ptx {

namespace matrix_detail {

struct Rows {
  uint32_t address;
  uint32_t* registers;
};

// The part of lane `lane` in an 8x8 matrix of 16-bit elements: two elements of one row, or of one column.
template <bool kTransposed>
void load(uint32_t (&fragment)[4], uint32_t address, emulator::Where where) {
  // Each lane reads one row in its own name, so that bounds, races and pending copies are its own.
  struct Arguments {
    uint16_t row[8];
    uint32_t* fragment;
  } mine;
  emulator::active_block().read_shared(address, mine.row, 16, where);
  mine.fragment = fragment;
  emulator::active_block().collective(kTransposed ? "ldmatrix.trans" : "ldmatrix", 0xffffffffu, &mine, [](void** lanes) {
    ++emulator::counts().ldmatrix;
    for (int lane = 0; lane < 32; ++lane) {
      auto* to = static_cast<Arguments*>(lanes[lane]);
      for (int matrix = 0; matrix < 4; ++matrix) {
        uint32_t pair = 0;
        for (int e = 0; e < 2; ++e) {
          const int row = kTransposed ? lane % 4 * 2 + e : lane / 4, column = kTransposed ? lane / 4 : lane % 4 * 2 + e;
          pair |= static_cast<uint32_t>(static_cast<Arguments*>(lanes[matrix * 8 + row])->row[column]) << (16 * e);
        }
        to->fragment[matrix] = pair;
      }
    }
  }, where);
}

}  // namespace matrix_detail

inline void load_matrices(uint32_t (&fragment)[4], uint32_t address, emulator::Where where = emulator::Where::current()) {
  matrix_detail::load<false>(fragment, address, where);
}
inline void load_matrices_transposed(uint32_t (&fragment)[4], uint32_t address,
                                     emulator::Where where = emulator::Where::current()) {
  matrix_detail::load<true>(fragment, address, where);
}

// stmatrix.x4 (compute capability 9.0): the inverse of load_matrices.
inline void store_matrices(const uint32_t (&fragment)[4], uint32_t address,
                           emulator::Where where = emulator::Where::current()) {
  struct Arguments {
    const uint32_t* fragment;
    uint16_t row[8];
  } mine{fragment, {}};
  emulator::active_block().collective("stmatrix", 0xffffffffu, &mine, [](void** lanes) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        const uint32_t pair = static_cast<Arguments*>(lanes[lane])->fragment[matrix];
        auto* row = static_cast<Arguments*>(lanes[matrix * 8 + lane / 4])->row;
        row[lane % 4 * 2] = static_cast<uint16_t>(pair);
        row[lane % 4 * 2 + 1] = static_cast<uint16_t>(pair >> 16);
      }
    }
  }, where);
  emulator::active_block().write_shared(address, mine.row, 16, where);
}

// c += a b, a [16 x 16] row-major, b [16 x 8] column-major, both of 16-bit elements T; c float32.
template <class T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                  emulator::Where where = emulator::Where::current()) {
  struct Arguments {
    float* c;
    const uint32_t* a;
    uint32_t b[2];
  } mine{c, a, {b0, b1}};
  emulator::active_block().collective("mma.sync", 0xffffffffu, &mine, [](void** lanes) {
    ++emulator::counts().mma;
    float a[16][16], b[16][8], sum[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const auto* from = static_cast<Arguments*>(lanes[lane]);
      const int row = lane / 4, pair = lane % 4 * 2;
      for (int half = 0; half < 4; ++half) {  // a0: (row, k), a1: (row + 8, k), a2: (row, k + 8), a3: (row + 8, k + 8)
        for (int e = 0; e < 2; ++e) {
          a[row + half % 2 * 8][pair + half / 2 * 8 + e] = widen(T{static_cast<uint16_t>(from->a[half] >> (16 * e))});
        }
      }
      for (int half = 0; half < 2; ++half) {
        for (int e = 0; e < 2; ++e) b[pair + half * 8 + e][row] = widen(T{static_cast<uint16_t>(from->b[half] >> (16 * e))});
      }
      for (int e = 0; e < 4; ++e) sum[row + e / 2 * 8][pair + e % 2] = from->c[e];
    }
    for (int i = 0; i < 16; ++i) {
      for (int k = 0; k < 16; ++k) {
        for (int j = 0; j < 8; ++j) sum[i][j] += a[i][k] * b[k][j];
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int e = 0; e < 4; ++e) static_cast<Arguments*>(lanes[lane])->c[e] = sum[lane / 4 + e / 2 * 8][lane % 4 * 2 + e % 2];
    }
  }, where);
}

}  // namespace lak::ptx
