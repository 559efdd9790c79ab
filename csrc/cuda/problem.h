// One sequence of the problem as a block sees it, and which keys its rows see. Lengths and indices come from device memory that
// nobody has checked: they are clamped here, so that no value of theirs leads out of bounds.
#pragma once

#include <cstdint>
#include <limits>

#include <ptx/convert.h>
#include <ptx/memory.h>

#include "zero_gate_params.h"

namespace lak {

constexpr double kLog2E = 1.4426950408889634;

// From here on backward's blocks share the keys of a query where they may (see adds_dquery()).
constexpr int64_t kLongSequence = 768;

// A packed batch with one prefix for everybody has no boundaries but the windows of its rows. Its tokens are handled as one long
// sequence (token tiles): every tile is full, whatever the lengths are, and nothing depends on the longest of them. Sequences
// that are long on average have few tiles that are not full, and other ways to be fast.
__host__ __device__ inline bool is_token_tiled(const ZeroGateParams& params) {
  return params.cu_seqlens_q != nullptr && params.prefix_index == nullptr && params.prefix_count <= 1 &&
         params.total_k <= kLongSequence * params.batch;
}

// What grids are laid out over: `sequences` of at most `rows` queries and `keys` keys.
struct Extent {
  int64_t sequences, rows, keys;
};
__host__ __device__ inline Extent extent_of(const ZeroGateParams& params) {
  if (is_token_tiled(params)) return {1, params.total_q, params.total_k};
  return {params.batch, params.seq_q, params.seq_k};
}

struct Sequence {
  int first_query, first_key;  // rows in memory
  int queries, keys;
  int rows, key_rows;  // what is written: more than the above where the tokens after the last sequence become zero
  int key_begin, key_end;  // the window of valid keys, within [0, keys]
  int diagonal;  // query i sees keys j <= i + diagonal
  int prefix;  // entry of the table
  int slots;  // prefix slots, 0 where there is no prefix
  bool bad_prefix;  // the index is outside of the table: the rows become NaN
};

// The keys [begin, end) that a query sees.
struct Window {
  int begin, end;
};

__device__ __forceinline__ int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }
__device__ __forceinline__ int lower(int a, int b) { return a < b ? a : b; }
__device__ __forceinline__ int higher(int a, int b) { return a > b ? a : b; }

// An offset into `total` packed tokens.
__device__ __forceinline__ int offset_at(const int32_t* cu_seqlens, int64_t at, int64_t total) {
  return static_cast<int>(clamp(ptx::load_global(cu_seqlens + at), 0, total));
}

// With token tiles b is 0 and means the whole batch.
__device__ __forceinline__ Sequence sequence_of(const ZeroGateParams& params, int b) {
  Sequence s;
  s.first_query = 0;
  s.first_key = 0;
  s.queries = static_cast<int>(params.seq_q);
  s.keys = static_cast<int>(params.seq_k);
  if (is_token_tiled(params)) {
    s.queries = offset_at(params.cu_seqlens_q, params.batch, params.total_q);
    s.keys = offset_at(params.cu_seqlens_k, params.batch, params.total_k);
  } else if (params.cu_seqlens_q != nullptr) {
    s.first_query = offset_at(params.cu_seqlens_q, b, params.total_q);
    s.queries = static_cast<int>(clamp(offset_at(params.cu_seqlens_q, b + 1, params.total_q) - s.first_query, 0, params.seq_q));
    s.first_key = offset_at(params.cu_seqlens_k, b, params.total_k);
    s.keys = static_cast<int>(clamp(offset_at(params.cu_seqlens_k, b + 1, params.total_k) - s.first_key, 0, params.seq_k));
  }
  s.rows = is_token_tiled(params) ? static_cast<int>(params.total_q) : s.queries;
  s.key_rows = is_token_tiled(params) ? static_cast<int>(params.total_k) : s.keys;
  s.key_begin = params.key_start == nullptr ? 0 : static_cast<int>(clamp(ptx::load_global(params.key_start + b), 0, s.keys));
  s.key_end = params.key_end == nullptr ? s.keys : static_cast<int>(clamp(ptx::load_global(params.key_end + b), 0, s.keys));
  s.diagonal = params.is_causal != 0 ? s.key_end - s.queries : s.keys;
  s.prefix = 0;
  s.slots = 0;
  s.bad_prefix = false;
  if (params.prefix_count > 0) {
    const int64_t entry = params.prefix_index != nullptr ? ptx::load_global(params.prefix_index + b)
                          : params.prefix_count == 1     ? 0
                                                         : b;
    s.bad_prefix = entry < -1 || entry >= params.prefix_count;
    if (entry >= 0 && !s.bad_prefix) {
      s.prefix = static_cast<int>(entry);
      s.slots = static_cast<int>(params.prefix_length);
    }
  }
  return s;
}

// The number of the packed sequence that holds a token: the last of those that begin at or before it.
__device__ __forceinline__ int sequence_holding(const int32_t* cu_seqlens, int64_t batch, int token) {
  int low = 0, high = static_cast<int>(batch);
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (ptx::load_global(cu_seqlens + middle) <= token ? low : high) = middle;
  }
  return low;
}

// Neither end ever decreases from one row to the next (where cu_seqlens does as it should).
__device__ __forceinline__ Window window_of(const ZeroGateParams& params, const Sequence& s, int row) {
  if (!is_token_tiled(params)) return {s.key_begin, higher(s.key_begin, lower(s.key_end, row + s.diagonal + 1))};
  if (params.batch == 0) return {0, 0};
  const int b = sequence_holding(params.cu_seqlens_q, params.batch, row);
  const int begin = offset_at(params.cu_seqlens_k, b, params.total_k),
            last = offset_at(params.cu_seqlens_k, b + 1, params.total_k);
  const int rows_after = params.is_causal != 0 ? offset_at(params.cu_seqlens_q, b + 1, params.total_q) - 1 - row : 0;
  return {begin, higher(begin, last - rows_after)};
}

// The queries [begin, end) among which are all that see one of the keys [first, first + count).
__device__ __forceinline__ Window rows_seeing(const ZeroGateParams& params, const Sequence& s, int first, int count) {
  const int last = lower(first + count, s.key_end) - 1;
  if (last < higher(first, s.key_begin)) return {0, 0};
  if (!is_token_tiled(params)) return {higher(first - s.diagonal, 0), s.queries};
  if (params.batch == 0) return {0, 0};
  const int b = sequence_holding(params.cu_seqlens_k, params.batch, first);
  int begin = offset_at(params.cu_seqlens_q, b, params.total_q);
  if (params.is_causal != 0) {
    const int keys_after = offset_at(params.cu_seqlens_k, b + 1, params.total_k) - first;
    begin = higher(begin, offset_at(params.cu_seqlens_q, b + 1, params.total_q) - keys_after);
  }
  return {begin, offset_at(params.cu_seqlens_q, sequence_holding(params.cu_seqlens_k, params.batch, last) + 1, params.total_q)};
}

// What one pass over a tile may read of the tensors that are summed over, and which of its results it stores.
//
// A packed sequence has to keep to itself what is not finite in it, but the zero probability of a key that a row does not see
// keeps nothing out of a product over a tile of several sequences: 0 x NaN is NaN. So whoever finds that a tile with several
// sequences has results that are not finite computes it again, for one of its sequences after the other, from the last to the
// first, with the rows of all others copied as zeros.
struct Part {
  static constexpr int kNone = std::numeric_limits<int>::min(), kAll = std::numeric_limits<int>::max();
  Window rows, keys;  // what is copied; zeros beside it
  int end = kAll;  // results from here on were stored by an earlier part
  int begin = kNone;  // results before are for a later part to store

  __device__ __forceinline__ bool is_whole() const { return end == kAll; }
};

__device__ __forceinline__ Part whole_part(const Sequence& s) { return {{0, s.queries}, {s.key_begin, s.key_end}}; }

// The part of the sequence that holds the last query, or the last key, before `end`.
__device__ __forceinline__ Part part_of_queries(const ZeroGateParams& params, const Sequence& s, int end) {
  const int last = end - 1, b = sequence_holding(params.cu_seqlens_q, params.batch, last);
  const Window keys{offset_at(params.cu_seqlens_k, b, params.total_k), offset_at(params.cu_seqlens_k, b + 1, params.total_k)};
  return {{0, s.queries}, keys, end, lower(offset_at(params.cu_seqlens_q, b, params.total_q), last)};
}
__device__ __forceinline__ Part part_of_keys(const ZeroGateParams& params, const Sequence& s, int end) {
  const int last = end - 1, b = sequence_holding(params.cu_seqlens_k, params.batch, last);
  const Window rows{offset_at(params.cu_seqlens_q, b, params.total_q), offset_at(params.cu_seqlens_q, b + 1, params.total_q)};
  return {rows, {s.key_begin, s.key_end}, end, lower(offset_at(params.cu_seqlens_k, b, params.total_k), last)};
}

template <class T>
__device__ __forceinline__ T* head_pointer(const TensorView& v, int64_t b, int64_t h, int64_t first_row) {
  return static_cast<T*>(v.data) + b * v.stride_batch + h * v.stride_head + first_row * v.stride_row;
}

__device__ __forceinline__ float gate_of(const ZeroGateParams& params, const Sequence& s, int h) {
  if (s.bad_prefix) return std::numeric_limits<float>::quiet_NaN();
  if (s.slots == 0) return 0.0f;
  return ptx::load_global(static_cast<const float*>(params.gate) + s.prefix * params.gate_stride_prefix +
                          h * params.gate_stride_head);
}

// Position of row 0 of a sequence in the log-sum-exps [B, Hq, total_q] (packed: [Hq, total_q]).
__device__ __forceinline__ int64_t statistic_row(const ZeroGateParams& params, const Sequence& s, int64_t b, int64_t h) {
  return ((params.cu_seqlens_q != nullptr ? 0 : b * params.heads_q) + h) * params.total_q + s.first_query;
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
