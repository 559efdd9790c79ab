// From raw products Q K^T to base-2 logits: scale, window, causality and mask, for a tile in accumulator layout.
#pragma once

#include "fragments.h"
#include "problem.h"

namespace lak {

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

// One score of a query and a key.
template <bool kElementwise>
__device__ __forceinline__ float score(float raw, const ScoreRule& rule, const Sequence& s, int query, int key) {
  if (key < s.key_begin || key >= visible_end(s, query) || query >= s.queries) return -kInfinity;
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

// Queries down, keys across.
template <bool kElementwise, int kM, int kN>
__device__ __forceinline__ void apply_rule(float (&c)[kM][kN][4], const ScoreRule& rule, const Sequence& s, int query, int key) {
  const int lane = lane_id();
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        c[m][n][e] = score<kElementwise>(c[m][n][e], rule, s, query + 16 * m + lane / 4 + e / 2 * 8,
                                         key + 8 * n + lane % 4 * 2 + e % 2);
      }
    }
  }
}

}  // namespace lak
