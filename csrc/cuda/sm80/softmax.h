// Softmax over tiles that come one after the other, in base 2: weights relative to the largest score so far.
#pragma once

#include <limits>

#include "sm80/fragments.h"

namespace lak::sm80 {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Online softmax of one tile: scores become probabilities relative to the new maximum, which is kept in units of `c`.
template <int kM, int kN, int kD>
__device__ __forceinline__ void softmax_step(float (&c)[kM][kN][4], float (&largest)[kM][2], float (&total)[kM][2],
                                             float (&output)[kM][kD][4], float scale_log2) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float tile_max = largest[m][half];
#pragma unroll
      for (int n = 0; n < kN; ++n) tile_max = fmaxf(tile_max, fmaxf(c[m][n][2 * half], c[m][n][2 * half + 1]));
      tile_max = row_max(tile_max);
      // A row that has seen no key yet: any finite shift keeps exp2(-inf) at 0.
      const float finite_max = tile_max == -kInfinity ? 0.0f : tile_max, shift = finite_max * scale_log2;
      // A difference of two maxima: of a large one that stayed the same nothing may be left but zero.
      const float rescale = ptx::exp2_fast((largest[m][half] - finite_max) * scale_log2);
      largest[m][half] = tile_max;
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          c[m][n][e] = ptx::exp2_fast(fmaf(c[m][n][e], scale_log2, -shift));
          sum += c[m][n][e];
        }
      }
      total[m][half] = fmaf(total[m][half], rescale, sum);
#pragma unroll
      for (int n = 0; n < kD; ++n) {
        output[m][n][2 * half] *= rescale;
        output[m][n][2 * half + 1] *= rescale;
      }
    }
  }
}

// What a softmax over tiles of 16 columns leaves of the rows g and g + 8 of a warp: the largest score, the sum of the weights
// 2^((score - largest) factor), and the sum of the weights times a value of their own. Where one weight is 1 and the others are
// 0 the mean of the values is, bit for bit, the value of that one.
struct RunningSoftmax {
  float largest[2] = {-kInfinity, -kInfinity}, total[2] = {}, weighted[2] = {};  // sums: this lane's share until finish()

  __device__ __forceinline__ void add(const float (&scores)[2][4], const float (&values)[2][4], float factor) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float new_max = largest[half];
#pragma unroll
      for (int n = 0; n < 2; ++n) new_max = fmaxf(new_max, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
      new_max = row_max(new_max);
      if (new_max == -kInfinity) continue;
      const float rescale = ptx::exp2_fast((largest[half] - new_max) * factor);
      total[half] *= rescale;
      weighted[half] *= rescale;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          const float weight = ptx::exp2_fast((scores[n][e] - new_max) * factor);
          total[half] += weight;
          weighted[half] = fmaf(weight, values[n][e], weighted[half]);
        }
      }
      largest[half] = new_max;
    }
  }
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      total[half] = row_sum(total[half]);
      weighted[half] = row_sum(weighted[half]);
    }
  }
};

}  // namespace lak::sm80
