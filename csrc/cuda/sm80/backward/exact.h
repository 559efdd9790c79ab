// Backward, statistics of single rows from their keys.
//
// D_w = rowsum(dO * O) - gate D_p carries the rounding of the saved output. Where a row sees few keys, dP - D_w cancels and
// that rounding would be all that is left; where O has overflowed, nothing is left; where scores are so large that a float32
// log-sum-exp is coarse, the probabilities are. Such rows take D_w = sum(P dP) and the log-sum-exp from Q, K and V again.
//
// A warp does this by itself for its 16 rows, straight from global memory: it is rare, or over within a tile or two.
#pragma once

#include "sm80/scores.h"
#include "sm80/softmax.h"

namespace lak::sm80 {

constexpr int kFewKeys = 16;

// The largest |log-sum-exp| whose rounding to float32 does not show in a result of type T.
template <class T>
constexpr float kCoarseLogsumexp = kIsHalf<T> ? 1024.0f : 32.0f;

// One warp's 16 rows, of which a lane has two: `row` and row + 8.
struct RowsOfWarp {
  const ZeroGateParams& params;
  const Sequence& s;
  const ScoreRule rule;
  int b, head_kv, row;
  Window window[2];
  bool elementwise;

  __device__ __forceinline__ float value(float raw, int half, int key) const {
    return elementwise ? adjusted_score<true>(raw, rule, row + 8 * half, key) : raw;
  }
  __device__ __forceinline__ bool sees(int half, int key) const {
    const bool inside = key >= window[half].begin && key < window[half].end;
    return inside && value(0.0f, half, key) != -kInfinity;  // what a product of zero leaves is the mask alone
  }
  // From the first to the last key that a row of the warp among those with `wanted` sees.
  __device__ __forceinline__ Window keys(const bool (&wanted)[2]) const {
    Window all{s.key_end, s.key_begin};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (wanted[half]) all = {lower(all.begin, window[half].begin), higher(all.end, window[half].end)};
    }
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) {
      all.begin = lower(all.begin, __shfl_xor_sync(kAllLanes, all.begin, lanes));
      all.end = higher(all.end, __shfl_xor_sync(kAllLanes, all.end, lanes));
    }
    return all;
  }
};

// Which rows a mask leaves at most kFewKeys keys. Most often the first tiles tell.
__device__ __forceinline__ void find_few_keys(const RowsOfWarp& rows, const bool (&there)[2], bool (&few)[2]) {
  const Window range = rows.keys(there);
  int seen[2] = {0, 0};
  few[0] = there[0], few[1] = there[1];
  for (int at = range.begin; at < range.end && __any_sync(kAllLanes, few[0] || few[1]); at += 16) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int key = at + n / 2 * 8 + lane_id() % 4 * 2 + n % 2;
        seen[half] += few[half] && rows.sees(half, key);
      }
      int total = seen[half];
      total += __shfl_xor_sync(kAllLanes, total, 1);
      total += __shfl_xor_sync(kAllLanes, total, 2);
      few[half] = few[half] && total <= kFewKeys;
    }
  }
}

// The softmax over the words of those rows that are `wanted`, each weight beside its dP.
template <class T, int kRows, int kHeadDim>
__device__ __forceinline__ RunningSoftmax softmax_of_words(const RowsOfWarp& rows, SharedTile<T, kRows, kHeadDim> query,
                                                           SharedTile<T, kRows, kHeadDim> doutput, int warp_row,
                                                           const bool (&wanted)[2]) {
  const ZeroGateParams& params = rows.params;
  const Sequence& s = rows.s;
  const T* key = head_pointer<const T>(params.key, rows.b, rows.head_kv, s.first_key);
  const T* value = head_pointer<const T>(params.value, rows.b, rows.head_kv, s.first_key);
  const int head_dim = static_cast<int>(params.head_dim);
  const Window range = rows.keys(wanted);
  RunningSoftmax softmax;
  for (int at = range.begin; at < range.end; at += 16) {
    float scores[2][4] = {}, dprobability[2][4] = {};
    bool any = false;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        any = any || (wanted[e / 2] && rows.sees(e / 2, at + 8 * n + lane_id() % 4 * 2 + e % 2));
      }
    }
    if (!__any_sync(kAllLanes, any)) continue;
    multiply_abt_rows(scores, query, warp_row, key, params.key.stride_row, at, s.key_begin, s.key_end, head_dim);
    multiply_abt_rows(dprobability, doutput, warp_row, value, params.value.stride_row, at, s.key_begin, s.key_end, head_dim);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int at_key = at + 8 * n + lane_id() % 4 * 2 + e % 2;
        const bool seen = wanted[e / 2] && rows.sees(e / 2, at_key);
        scores[n][e] = seen ? rows.value(scores[n][e], e / 2, at_key) : -kInfinity;
        dprobability[n][e] = seen ? dprobability[n][e] : 0.0f;  // a weight of 0 does not hide NaN
      }
    }
    softmax.add(scores, dprobability, rows.elementwise ? 1.0f : rows.rule.scale_log2);
  }
  softmax.finish();
  return softmax;
}

}  // namespace lak::sm80
