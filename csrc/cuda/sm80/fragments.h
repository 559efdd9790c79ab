// Tiles in shared memory and matrix fragments in registers, for 16-bit elements on tensor cores and for float32 in plain
// multiply-adds behind the same interface.
//
// Fragments of m16n8k16, lane = 4 g + t. Accumulator C [16 x 8]: c[0..1] = (row g, columns 2t, 2t + 1), c[2..3] = row g + 8.
// 16 bit: A and B as the instruction wants them. float32: each lane holds all 16 k of the rows g, g + 8 (A) and of the
// columns 2t, 2t + 1 (B) that its part of C needs.
#pragma once

#include <limits>

#include <ptx/async_copy.h>
#include <ptx/convert.h>
#include <ptx/matrix.h>
#include <ptx/memory.h>

#include "sm80/tiles.h"

namespace lak::sm80 {

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ int lane_id() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp_id() { return threadIdx.x / 32; }

// kRows x kColumns elements, rows of 16-byte chunks. Chunks are permuted within a row (XOR with its number), so that eight
// consecutive rows of one column of chunks lie in different banks.
template <class T, int kRows_, int kColumns_>
struct SharedTile {
  static constexpr int kRows = kRows_, kColumns = kColumns_;
  static constexpr int kChunk = 16 / sizeof(T);  // elements
  static constexpr int kChunks = kColumns / kChunk;
  static constexpr int kRowBytes = kColumns * sizeof(T);
  static constexpr int kBytes = kRows * kRowBytes;
  static_assert(kChunks % 8 == 0 || kChunks == 4 || kChunks == 2, "the permutation is made for these");

  uint32_t base;

  static __device__ __forceinline__ int permuted(int row, int c) {
    return c ^ (kChunks == 2 ? row / 4 % 2 : kChunks == 4 ? row / 2 % 4 : row % 8);
  }
  __device__ __forceinline__ uint32_t chunk(int row, int c) const { return base + row * kRowBytes + permuted(row, c) * 16; }

  // chunk(row + lane_row, c + lane_chunk), where `row` is a multiple of 8 and c + lane_chunk carries nothing. One register
  // serves a whole tile: the columns differ by an XOR, the rows by an offset within the instruction. `base` is a multiple
  // of kRowBytes.
  __device__ __forceinline__ uint32_t chunk(int row, int c, int lane_row, int lane_chunk) const {
    const uint32_t lane = base + lane_row * kRowBytes + permuted(lane_row, lane_chunk) * 16;
    return (lane ^ (c * 16)) + row * kRowBytes;
  }
  __device__ __forceinline__ uint32_t element(int row, int column) const {
    return chunk(row, column / kChunk) + column % kChunk * sizeof(T);
  }
};

// Starts the copy of rows [first, first + kRows) of a matrix by kParticipants threads; rows outside of [low, high) and
// columns from head_dim on become zero. `rows` points to row 0.
template <int kParticipants, class T, int kRows, int kColumns>
__device__ __forceinline__ void copy_rows(SharedTile<T, kRows, kColumns> tile, const T* rows, int64_t stride, int first,
                                          int low, int high, int head_dim, int participant) {
  using Tile = SharedTile<T, kRows, kColumns>;
  static_assert(kParticipants % Tile::kChunks == 0, "each thread copies one column of chunks");
  constexpr int kStep = kParticipants / Tile::kChunks;  // rows between two chunks of a thread
  const int c = participant % Tile::kChunks, own = participant / Tile::kChunks;
  const T* source = rows + static_cast<int64_t>(first + own) * stride + c * Tile::kChunk;
  // One comparison a row: from `low` on, as a number without sign.
  const unsigned valid_rows = c * Tile::kChunk < head_dim && low < high ? high - low : 0, begin = first + own - low;
#pragma unroll
  for (int i = 0; i < kRows / kStep; ++i) {
    const uint32_t to = kStep % 8 == 0 ? tile.chunk(i * kStep, 0, own, c) : tile.chunk(own + i * kStep, c);
    ptx::copy_async_16(to, source, begin + i * kStep < valid_rows);
    source += kStep * stride;
  }
}

template <class T>
struct FragmentA {
  uint32_t r[4];
};
template <class T>
struct FragmentB {  // two neighbouring 8-column fragments
  uint32_t r[4];
};
template <>
struct FragmentA<float> {
  float k[2][16];
};
template <>
struct FragmentB<float> {
  float k[4][16];
};

// A[m][k] = tile[row + m][column + k]
template <class T, int R, int C>
__device__ __forceinline__ void load_a(FragmentA<T>& a, SharedTile<T, R, C> tile, int row, int column) {
  const int lane = lane_id();
  if constexpr (kIsHalf<T>) {
    ptx::load_matrices(a.r, tile.chunk(row, column / 8, lane % 16, lane / 16));
  } else {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int k = 0; k < 16; k += 4) {
        const float4 v = ptx::load_shared<float4>(tile.element(row + lane / 4 + 8 * half, column + k));
        a.k[half][k] = v.x, a.k[half][k + 1] = v.y, a.k[half][k + 2] = v.z, a.k[half][k + 3] = v.w;
      }
    }
  }
}

// A[m][k] = tile[row + k][column + m]
template <class T, int R, int C>
__device__ __forceinline__ void load_a_transposed(FragmentA<T>& a, SharedTile<T, R, C> tile, int row, int column) {
  const int lane = lane_id();
  if constexpr (kIsHalf<T>) {
    ptx::load_matrices_transposed(a.r, tile.chunk(row, column / 8, lane % 8 + lane / 16 * 8, lane / 8 % 2));
  } else {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int k = 0; k < 16; ++k) a.k[half][k] = ptx::load_shared<float>(tile.element(row + k, column + lane / 4 + 8 * half));
    }
  }
}

// B[k][n] = tile[row + n][column + k], 16 columns n
template <class T, int R, int C>
__device__ __forceinline__ void load_b(FragmentB<T>& b, SharedTile<T, R, C> tile, int row, int column) {
  const int lane = lane_id();
  if constexpr (kIsHalf<T>) {
    ptx::load_matrices(b.r, tile.chunk(row, column / 8, lane % 8 + lane / 16 * 8, lane / 8 % 2));
  } else {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int k = 0; k < 16; k += 4) {
        const float4 v = ptx::load_shared<float4>(tile.element(row + n / 2 * 8 + lane % 4 * 2 + n % 2, column + k));
        b.k[n][k] = v.x, b.k[n][k + 1] = v.y, b.k[n][k + 2] = v.z, b.k[n][k + 3] = v.w;
      }
    }
  }
}

// B[k][n] = tile[row + k][column + n], 16 columns n
template <class T, int R, int C>
__device__ __forceinline__ void load_b_transposed(FragmentB<T>& b, SharedTile<T, R, C> tile, int row, int column) {
  const int lane = lane_id();
  if constexpr (kIsHalf<T>) {
    ptx::load_matrices_transposed(b.r, tile.chunk(row, column / 8, lane % 16, lane / 16));
  } else {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int k = 0; k < 16; ++k) {
        b.k[n][k] = ptx::load_shared<float>(tile.element(row + k, column + n / 2 * 8 + lane % 4 * 2 + n % 2));
      }
    }
  }
}

// Two neighbouring elements of global memory.
template <class T>
__device__ __forceinline__ float2 load_pair(const T* address) {
  if constexpr (kIsHalf<T>) {
    const uint32_t pair = ptx::load_global(reinterpret_cast<const uint32_t*>(address));
    return {ptx::widen(T{static_cast<uint16_t>(pair)}), ptx::widen(T{static_cast<uint16_t>(pair >> 16)})};
  } else {
    return ptx::load_global(reinterpret_cast<const float2*>(address));
  }
}

// The sum of the products of 16 bytes of elements each.
template <class T>
__device__ __forceinline__ float product_of_chunks(const uint4& x, const uint4& y) {
  const uint32_t left[4] = {x.x, x.y, x.z, x.w}, right[4] = {y.x, y.y, y.z, y.w};
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kIsHalf<T>) {
#pragma unroll
      for (int shift = 0; shift < 32; shift += 16) {
        const T a{static_cast<uint16_t>(left[i] >> shift)}, b{static_cast<uint16_t>(right[i] >> shift)};
        sum = fmaf(ptx::widen(a), ptx::widen(b), sum);
      }
    } else {
      sum = fmaf(__uint_as_float(left[i]), __uint_as_float(right[i]), sum);
    }
  }
  return sum;
}

// load_a without a tile: A[m][k] = rows[m * stride + k] from global memory; zero from column `columns`, a multiple of four, on.
template <class T>
__device__ __forceinline__ void load_a_rows(FragmentA<T>& a, const T* rows, int64_t stride, int columns) {
  const int lane = lane_id();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const T* at = rows + (lane / 4 + 8 * half) * stride;
    if constexpr (kIsHalf<T>) {
#pragma unroll
      for (int k = 0; k < 16; k += 8) {
        const int column = k + lane % 4 * 2;
        a.r[half + k / 4] = column < columns ? ptx::load_global(reinterpret_cast<const uint32_t*>(at + column)) : 0;
      }
    } else {
#pragma unroll
      for (int k = 0; k < 16; k += 4) {
        const float4 v = k < columns ? ptx::load_global(reinterpret_cast<const float4*>(at + k)) : float4{};
        a.k[half][k] = v.x, a.k[half][k + 1] = v.y, a.k[half][k + 2] = v.z, a.k[half][k + 3] = v.w;
      }
    }
  }
}

// load_b without a tile: B[k][n] = rows[(row + n) * stride + column + k] from global memory; rows outside of [low, high) and
// columns from head_dim on are zero. For the few tiles that are read by a single warp.
template <class T>
__device__ __forceinline__ void load_b_rows(FragmentB<T>& b, const T* rows, int64_t stride, int row, int low, int high,
                                            int column, int head_dim) {
  const int lane = lane_id();
#pragma unroll
  for (int n = 0; n < (kIsHalf<T> ? 2 : 4); ++n) {
    const int r = row + (kIsHalf<T> ? 8 * n + lane / 4 : n / 2 * 8 + lane % 4 * 2 + n % 2);
    const T* at = rows + r * stride + column;
    const bool there = r >= low && r < high;
    if constexpr (kIsHalf<T>) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const bool valid = there && column + 8 * half < head_dim;
        b.r[2 * n + half] = valid ? ptx::load_global(reinterpret_cast<const uint32_t*>(at + 8 * half + lane % 4 * 2)) : 0u;
      }
    } else {
#pragma unroll
      for (int k = 0; k < 16; k += 4) {
        const float4 v = there && column + k < head_dim ? ptx::load_global(reinterpret_cast<const float4*>(at + k)) : float4{};
        b.k[n][k] = v.x, b.k[n][k + 1] = v.y, b.k[n][k + 2] = v.z, b.k[n][k + 3] = v.w;
      }
    }
  }
}

// c0, c1 += a b: 16 x 16 results
template <class T>
__device__ __forceinline__ void multiply_add(float (&c0)[4], float (&c1)[4], const FragmentA<T>& a, const FragmentB<T>& b) {
  if constexpr (kIsHalf<T>) {
    ptx::mma_m16n8k16<T>(c0, a.r, b.r[0], b.r[1]);
    ptx::mma_m16n8k16<T>(c1, a.r, b.r[2], b.r[3]);
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      // The 16 products by themselves: added one by one, small ones would lose their digits in a large c.
      float sum0 = 0.0f, sum1 = 0.0f;
#pragma unroll
      for (int k = 0; k < 16; ++k) {
        sum0 = fmaf(a.k[e / 2][k], b.k[e % 2][k], sum0);
        sum1 = fmaf(a.k[e / 2][k], b.k[2 + e % 2][k], sum1);
      }
      c0[e] += sum0;
      c1[e] += sum1;
    }
  }
}

// Two neighbouring accumulators become the A operand of a product over their columns, without leaving the registers.
template <class T>
__device__ __forceinline__ void to_fragment_a(FragmentA<T>& a, const float (&c0)[4], const float (&c1)[4]) {
  if constexpr (kIsHalf<T>) {
    a.r[0] = ptx::pack<T>(c0[0], c0[1]);
    a.r[1] = ptx::pack<T>(c0[2], c0[3]);
    a.r[2] = ptx::pack<T>(c1[0], c1[1]);
    a.r[3] = ptx::pack<T>(c1[2], c1[3]);
  } else {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int t = 0; t < 4; ++t) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int source = lane_id() / 4 * 4 + t;
          a.k[half][2 * t + e] = __shfl_sync(kAllLanes, c0[2 * half + e], source);
          a.k[half][8 + 2 * t + e] = __shfl_sync(kAllLanes, c1[2 * half + e], source);
        }
      }
    }
  }
}

template <int kM, int kN>
__device__ __forceinline__ void set_zero(float (&c)[kM][kN][4]) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) c[m][n][e] = 0.0f;
    }
  }
}

template <int kM, int kN>
__device__ __forceinline__ bool all_finite(const float (&c)[kM][kN][4]) {
  bool finite = true;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) finite = finite && fabsf(c[m][n][e]) < std::numeric_limits<float>::infinity();
    }
  }
  return finite;
}

// c += X Y^T over columns 0..kColumns of both tiles: rows x_row.. of X (16 kM of them) by rows y_row.. of Y (8 kN).
template <int kM, int kN, class T, int RX, int RY, int C>
__device__ __forceinline__ void multiply_abt(float (&c)[kM][kN][4], SharedTile<T, RX, C> x, int x_row, SharedTile<T, RY, C> y,
                                             int y_row) {
  constexpr int kUnroll = kIsHalf<T> ? 2 : 1;  // more takes registers and gains nothing; float32 has enough to do in one step
#pragma unroll kUnroll
  for (int k = 0; k < C; k += 16) {
    FragmentA<T> a[kM];
#pragma unroll
    for (int m = 0; m < kM; ++m) load_a(a[m], x, x_row + 16 * m, k);
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      FragmentB<T> b;
      load_b(b, y, y_row + 8 * n, k);
#pragma unroll
      for (int m = 0; m < kM; ++m) multiply_add(c[m][n], c[m][n + 1], a[m], b);
    }
  }
}

// c += X Y^T as multiply_abt in the same order of sums, so that both give the same bits: 16 rows of X from x_row on by 16 rows
// of Y in global memory, of which those outside of [low, high) are zero.
template <class T, int R, int C>
__device__ __forceinline__ void multiply_abt_rows(float (&c)[2][4], SharedTile<T, R, C> x, int x_row, const T* y,
                                                  int64_t stride, int y_row, int low, int high, int head_dim) {
#pragma unroll 1
  for (int k = 0; k < C; k += 16) {
    FragmentA<T> a;
    FragmentB<T> b;
    load_a(a, x, x_row, k);
    load_b_rows(b, y, stride, y_row, low, high, k, head_dim);
    multiply_add(c[0], c[1], a, b);
  }
}

// c += A Y[y_row .. y_row + 16]: one step of a product.
template <int kM, int kN, class T, int R, int C>
__device__ __forceinline__ void multiply_add_row(float (&c)[kM][kN][4], const FragmentA<T> (&a)[kM], SharedTile<T, R, C> y,
                                                 int y_row, int y_column) {
#pragma unroll
  for (int n = 0; n < kN; n += 2) {
    FragmentB<T> b;
    load_b_transposed(b, y, y_row, y_column + 8 * n);
#pragma unroll
    for (int m = 0; m < kM; ++m) multiply_add(c[m][n], c[m][n + 1], a[m], b);
  }
}

// c += X Y over the columns of X and the rows of Y: rows x_row.. of X (16 kM of them) by columns y_column.. of Y (8 kN).
template <int kM, int kN, class T, int R, int K, int C>
__device__ __forceinline__ void multiply_ab(float (&c)[kM][kN][4], SharedTile<T, R, K> x, int x_row, SharedTile<T, K, C> y,
                                            int y_column) {
  constexpr int kUnroll = kIsHalf<T> ? 2 : 1;
#pragma unroll kUnroll
  for (int k = 0; k < K; k += 16) {
    FragmentA<T> a[kM];
#pragma unroll
    for (int m = 0; m < kM; ++m) load_a(a[m], x, x_row + 16 * m, k);
    multiply_add_row(c, a, y, k, y_column);
  }
}

// c += X^T Y over the rows of both: columns x_column.. of X (16 kM of them) by columns y_column.. of Y (8 kN).
template <int kM, int kN, class T, int K, int CX, int C>
__device__ __forceinline__ void multiply_atb(float (&c)[kM][kN][4], SharedTile<T, K, CX> x, int x_column, SharedTile<T, K, C> y,
                                             int y_column) {
  constexpr int kUnroll = kIsHalf<T> ? 2 : 1;
#pragma unroll kUnroll
  for (int k = 0; k < K; k += 16) {
    FragmentA<T> a[kM];
#pragma unroll
    for (int m = 0; m < kM; ++m) load_a_transposed(a[m], x, k, x_column + 16 * m);
    multiply_add_row(c, a, y, k, y_column);
  }
}

// c += P Y, P [16 kM x 8 kK] in accumulators, Y rows y_row.., columns from `column` on.
template <int kM, int kK, int kN, class T, int R, int C>
__device__ __forceinline__ void multiply_pb(float (&c)[kM][kN][4], const float (&p)[kM][kK][4], SharedTile<T, R, C> y,
                                            int y_row, int column = 0) {
#pragma unroll
  for (int k = 0; k < kK; k += 2) {
    FragmentA<T> a[kM];
#pragma unroll
    for (int m = 0; m < kM; ++m) to_fragment_a<T>(a[m], p[m][k], p[m][k + 1]);
    multiply_add_row(c, a, y, y_row + 8 * k, column);
  }
}

// Accumulators to shared memory, as elements of T.
template <int kM, int kN, class T, int R, int C>
__device__ __forceinline__ void store_tile(SharedTile<T, R, C> tile, int row, int column, const float (&c)[kM][kN][4]) {
  const int lane = lane_id();
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float x = c[m][n][2 * half], y = c[m][n][2 * half + 1];
        if constexpr (kIsHalf<T>) {  // 8 columns are a chunk
          const uint32_t at = tile.chunk(row + 16 * m + 8 * half, column / 8 + n, lane / 4, 0);
          ptx::store_shared(at + lane % 4 * 4, ptx::pack<T>(x, y));
        } else {
          ptx::store_shared(tile.element(row + 16 * m + 8 * half + lane / 4, column + 8 * n + lane % 4 * 2), float2{x, y});
        }
      }
    }
  }
}

// Over the four lanes that share a row.
__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

// Two neighbouring elements to global memory.
template <class T>
__device__ __forceinline__ void store_pair(T* address, float x, float y) {
  if constexpr (kIsHalf<T>) {
    ptx::store_global(reinterpret_cast<uint32_t*>(address), ptx::pack<T>(x, y));
  } else {
    ptx::store_global(reinterpret_cast<float2*>(address), float2{x, y});
  }
}

// The four lanes of a quad have four registers each; afterwards lane t has what was number t in each of them.
__device__ __forceinline__ void transpose_in_quad(uint32_t (&r)[4]) {
#pragma unroll
  for (int distance = 1; distance < 4; distance *= 2) {
    const bool upper = (lane_id() & distance) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((i & distance) != 0) continue;
      const uint32_t received = __shfl_xor_sync(kAllLanes, upper ? r[i] : r[i + distance], distance);
      (upper ? r[i] : r[i + distance]) = received;
    }
  }
}

// Stores columns [column, column + 8 kN) of accumulators, times `factor`, to the rows below `limit`; rows from `live` on become
// zero. `rows` points to row 0, column 0. Of 16-bit elements a lane stores 16 bytes at a time where kN allows it.
template <int kN, class T>
__device__ __forceinline__ void store_rows(T* rows, int64_t stride, int row, int limit, const float (&c)[kN][4], float factor,
                                           int column, int head_dim, int live) {
  const int lane = lane_id();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = row + lane / 4 + 8 * half;
    T* const at = rows + r * stride;
    if constexpr (kIsHalf<T> && kN % 4 == 0) {
#pragma unroll
      for (int n = 0; n < kN; n += 4) {
        uint32_t pairs[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t pair = ptx::pack<T>(c[n + i][2 * half] * factor, c[n + i][2 * half + 1] * factor);
          pairs[i] = r < live ? pair : 0u;
        }
        transpose_in_quad(pairs);
        const int to = column + 8 * (n + lane % 4);
        if (r < limit && to < head_dim) {
          ptx::store_global(reinterpret_cast<uint4*>(at + to), uint4{pairs[0], pairs[1], pairs[2], pairs[3]});
        }
      }
    } else {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const int to = column + 8 * n + lane % 4 * 2;
        const float x = r < live ? c[n][2 * half] * factor : 0.0f, y = r < live ? c[n][2 * half + 1] * factor : 0.0f;
        if (r < limit && to < head_dim) store_pair(at + to, x, y);
      }
    }
  }
}

}  // namespace lak::sm80
