// One sequence of the problem as a block sees it. Lengths and indices come from device memory that nobody has checked:
// they are clamped here, so that no value of theirs leads out of bounds.
#pragma once

#include <cstdint>
#include <limits>

#include <ptx/convert.h>
#include <ptx/memory.h>

#include "zero_gate_params.h"

namespace lak {

constexpr double kLog2E = 1.4426950408889634;

struct Sequence {
  int first_query, first_key;  // rows in memory
  int queries, keys;
  int key_begin, key_end;  // the window of valid keys, within [0, keys]
  int diagonal;            // query i sees keys j <= i + diagonal
  int prefix;              // entry of the table
  int slots;               // prefix slots, 0 where there is no prefix
  bool bad_prefix;         // the index is outside of the table: the rows become NaN
};

__device__ __forceinline__ int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

__device__ __forceinline__ Sequence sequence_of(const ZeroGateParams& p, int b) {
  Sequence s;
  s.first_query = 0;
  s.first_key = 0;
  s.queries = static_cast<int>(p.seq_q);
  s.keys = static_cast<int>(p.seq_k);
  if (p.cu_seqlens_q != nullptr) {
    s.first_query = static_cast<int>(clamp(ptx::load_global(p.cu_seqlens_q + b), 0, p.total_q));
    s.queries =
        static_cast<int>(clamp(clamp(ptx::load_global(p.cu_seqlens_q + b + 1), 0, p.total_q) - s.first_query, 0, p.seq_q));
    s.first_key = static_cast<int>(clamp(ptx::load_global(p.cu_seqlens_k + b), 0, p.total_k));
    s.keys = static_cast<int>(clamp(clamp(ptx::load_global(p.cu_seqlens_k + b + 1), 0, p.total_k) - s.first_key, 0, p.seq_k));
  }
  s.key_begin = p.key_start == nullptr ? 0 : static_cast<int>(clamp(ptx::load_global(p.key_start + b), 0, s.keys));
  s.key_end = p.key_end == nullptr ? s.keys : static_cast<int>(clamp(ptx::load_global(p.key_end + b), 0, s.keys));
  s.diagonal = p.is_causal != 0 ? s.key_end - s.queries : s.keys;
  s.prefix = 0;
  s.slots = 0;
  s.bad_prefix = false;
  if (p.prefix_count > 0) {
    const int64_t entry = p.prefix_index != nullptr ? ptx::load_global(p.prefix_index + b) : p.prefix_count == 1 ? 0 : b;
    s.bad_prefix = entry < -1 || entry >= p.prefix_count;
    if (entry >= 0 && !s.bad_prefix) {
      s.prefix = static_cast<int>(entry);
      s.slots = static_cast<int>(p.prefix_length);
    }
  }
  return s;
}

__device__ __forceinline__ int lower(int a, int b) { return a < b ? a : b; }
__device__ __forceinline__ int higher(int a, int b) { return a > b ? a : b; }

// One past the last key that some query up to `last_query` sees.
__device__ __forceinline__ int visible_end(const Sequence& s, int last_query) {
  return lower(s.key_end, last_query + s.diagonal + 1);
}

template <class T>
__device__ __forceinline__ T* head_pointer(const TensorView& v, int64_t b, int64_t h, int64_t first_row) {
  return static_cast<T*>(v.data) + b * v.stride_batch + h * v.stride_head + first_row * v.stride_row;
}

__device__ __forceinline__ float gate_of(const ZeroGateParams& p, const Sequence& s, int h) {
  if (s.bad_prefix) return std::numeric_limits<float>::quiet_NaN();
  if (s.slots == 0) return 0.0f;
  return ptx::load_global(static_cast<const float*>(p.gate) + s.prefix * p.gate_stride_prefix + h * p.gate_stride_head);
}

// Position of row 0 of a sequence in a [B, Hq, total_q] statistic of the workspace (packed: [Hq, total_q]).
__device__ __forceinline__ int64_t statistic_row(const ZeroGateParams& p, const Sequence& s, int64_t b, int64_t h) {
  return ((p.cu_seqlens_q != nullptr ? 0 : b * p.heads_q) + h) * p.total_q + s.first_query;
}

// What is added to a scaled score, times log2(e).
__device__ __forceinline__ float mask_value(const MaskView& mask, int64_t offset) {
  constexpr float kFactor = static_cast<float>(kLog2E);
  switch (mask.type) {
    case MaskType::kBool:
      return ptx::load_global(static_cast<const uint8_t*>(mask.data) + offset) != 0 ? 0.0f
                                                                                    : -std::numeric_limits<float>::infinity();
    case MaskType::kFloat32: return kFactor * ptx::load_global(static_cast<const float*>(mask.data) + offset);
    case MaskType::kBFloat16: return kFactor * ptx::widen(ptx::load_global(static_cast<const BFloat16*>(mask.data) + offset));
    case MaskType::kFloat16: return kFactor * ptx::widen(ptx::load_global(static_cast<const Float16*>(mask.data) + offset));
    case MaskType::kFloat64:
      return kFactor * static_cast<float>(ptx::load_global(static_cast<const double*>(mask.data) + offset));
    case MaskType::kNone: break;
  }
  return 0.0f;
}

}  // namespace lak
