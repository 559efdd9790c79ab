// From raw products Q K^T to base-2 logits: scale, window, causality and mask, for a tile in accumulator layout.
#pragma once

#include "problem.h"
#include "sm80/fragments.h"

namespace lak::sm80 {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// kElementwise: a mask, or a scale that is not positive. Then scores leave here scaled (factor 1 is used later); otherwise
// they stay raw and one multiply-add scales them inside of the exponential.
struct ScoreRule {
  MaskView mask;
  int64_t mask_base;  // element (b, h, 0, 0)
  float scale_log2;   // scale * log2(e)
};

__device__ __forceinline__ ScoreRule score_rule(const ZeroGateParams& p, int64_t b, int64_t h) {
  constexpr double kLog2E = 1.4426950408889634;
  return {p.mask, b * p.mask.stride_batch + h * p.mask.stride_head, static_cast<float>(p.scale * kLog2E)};
}

// The score of a query and a key that it sees.
template <bool kElementwise>
__device__ __forceinline__ float adjusted_score(float raw, const ScoreRule& rule, int query, int key) {
  if constexpr (!kElementwise) {
    return raw;
  } else {
    float value = raw * rule.scale_log2;
    if (rule.mask.type != MaskType::kNone) {
      value += mask_value(rule.mask, rule.mask_base + query * rule.mask.stride_query + key * rule.mask.stride_key);
    }
    return value;
  }
}

template <bool kElementwise>
__device__ __forceinline__ float score(float raw, const ScoreRule& rule, const Sequence& s, int query, int key) {
  if (key < s.key_begin || key >= visible_end(s, query) || query >= s.queries) return -kInfinity;
  return adjusted_score<kElementwise>(raw, rule, query, key);
}

// P of a word from its saved log-sum-exp: 2^(scale raw - log2(e) lse), scale in base 2. In float32 the rounding of the product
// with log2(e) would show in every probability of a row, so its rest is taken along.
template <class T>
__device__ __forceinline__ float word_probability(float raw, float scale, float logsumexp) {
  constexpr float kLog2E = 1.4426950408889634f;
  if (raw == -kInfinity) return 0.0f;  // a row that sees no key has lse = -inf
  const float shift = logsumexp * kLog2E, exponent = fmaf(raw, scale, -shift);
  if constexpr (sizeof(T) == 4) return ptx::exp2_fast(exponent - fmaf(logsumexp, kLog2E, -shift));
  return ptx::exp2_fast(exponent);
}

// Queries down, keys across.
template <bool kElementwise, int kM, int kN>
__device__ __forceinline__ void apply_rule(float (&c)[kM][kN][4], const ScoreRule& rule, const Sequence& s, int query,
                                           int key) {
  // Needed at the edges alone: nothing of it is kept in registers between the tiles.
  const int lane = ptx::opaque(lane_id()), first = key + lane % 4 * 2;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = query + 16 * m + 8 * half + lane / 4;
      // Rows past the last are computed along and never stored; only the mask has nothing for them.
      const int end = kElementwise && row >= s.queries ? 0 : visible_end(s, row);
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& value = c[m][n][2 * half + e];
          const int at = first + 8 * n + e;
          value = at < s.key_begin || at >= end ? -kInfinity : adjusted_score<kElementwise>(value, rule, row, at);
        }
      }
    }
  }
}

}  // namespace lak::sm80
