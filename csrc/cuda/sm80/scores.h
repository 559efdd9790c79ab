// From raw products Q K^T to base-2 logits: scale, window, causality and mask, for a tile in accumulator layout.
#pragma once

#include "problem.h"
#include "sm80/fragments.h"
#include "sm80/softmax.h"

namespace lak::sm80 {

__host__ __device__ inline bool needs_elementwise_scores(const ZeroGateParams& params) {
  return params.mask.type != MaskType::kNone || !(params.scale > 0.0);
}

// kElementwise: a mask, or a scale that is not positive. Then scores leave here scaled (factor 1 is used later); otherwise
// they stay raw and one multiply-add scales them inside of the exponential.
struct ScoreRule {
  MaskView mask;
  int64_t mask_base;  // element (b, h, 0, 0)
  float scale_log2;   // scale * log2(e)
};

__device__ __forceinline__ ScoreRule score_rule(const ZeroGateParams& params, int64_t b, int64_t h) {
  return {params.mask, b * params.mask.stride_batch + h * params.mask.stride_head, static_cast<float>(params.scale * kLog2E)};
}

// The score of a query and a key that it sees.
template <bool kElementwise>
__device__ __forceinline__ float adjusted_score(float raw, const ScoreRule& rule, int query, int key) {
  if constexpr (!kElementwise) {
    return raw;
  } else {
    const float value = raw * rule.scale_log2;
    if (rule.mask.type == MaskType::kNone) return value;
    const float mask = mask_value(rule.mask, rule.mask_base + query * rule.mask.stride_query + key * rule.mask.stride_key);
    return mask == -kInfinity ? mask : value + mask;  // of a hidden key not even NaN is seen
  }
}

// A Part in shared memory, where it takes no registers during the pass.
struct SharedPart {
  static constexpr int kBytes = 32;
  uint32_t base;

  __device__ __forceinline__ Window rows() const { return ptx::load_shared<Window>(base); }
  __device__ __forceinline__ Window keys() const { return ptx::load_shared<Window>(base + 8); }
  __device__ __forceinline__ Part load() const {
    const Window stored = ptx::load_shared<Window>(base + 16);
    return {rows(), keys(), stored.end, stored.begin};
  }
  // By a single thread, between two barriers.
  __device__ __forceinline__ void store(const Part& part) const {
    ptx::store_shared(base, part.rows);
    ptx::store_shared(base + 8, part.keys);
    ptx::store_shared(base + 16, Window{part.begin, part.end});
  }
};

// What backward knows of a row's softmax over the words: P = 2^((score - shift) factor - rest), D_w. The shift is the
// log-sum-exp in units of the scores, so that of a large score nothing is rounded before the difference. float32 keeps what
// the shift loses by its own rounding.
template <class T>
__device__ __forceinline__ float word_probability(float score, float factor, float shift, float rest) {
  const float difference = score - shift;
  if constexpr (sizeof(T) == 4) return ptx::exp2_fast(fmaf(difference, factor, -rest));
  return ptx::exp2_fast(difference * factor);
}

// Keys that a row does not see get a score of -inf; the others are adjusted. Queries down from `first_query` on, keys across from
// `first_key` on. `windows`: address of the window of the first query in shared memory.
template <bool kElementwise, int kM, int kN>
__device__ __forceinline__ void apply_windows(float (&c)[kM][kN][4], const ScoreRule& rule, const Sequence& s, uint32_t windows,
                                              int first_query, int first_key) {
  // Needed at the edges alone: nothing of it is kept in registers between the tiles.
  const int lane = ptx::opaque(lane_id()), first = first_key + lane % 4 * 2;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = 16 * m + 8 * half + lane / 4;
      const Window window = ptx::load_shared<Window>(windows + row * static_cast<int>(sizeof(Window)));
      const unsigned from = first - window.begin, count = window.end - window.begin;
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& value = c[m][n][2 * half + e];
          const int at = 8 * n + e;
          // Rows past the last are computed along and never stored; only the mask has nothing for them.
          const int query = kElementwise ? lower(first_query + row, s.queries - 1) : 0;
          value = from + at < count ? adjusted_score<kElementwise>(value, rule, query, first + at) : -kInfinity;
        }
      }
    }
  }
}

}  // namespace lak::sm80
