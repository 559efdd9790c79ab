// The problem description of zero-init gated attention: the only thing a kernel of any backend sees.
//
//   output = softmax(scale Q K^T) V + gate * softmax(scale Q Kp^T) Vp
//
// Plain old data, so that the same struct is filled by the torch op, by a test driver or by the CUDA emulator and is
// passed by value to a GPU kernel. No torch header is included here and none may be.
#pragma once

#include <cstdint>

namespace lak {

enum class DataType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

// kNone: no mask. kBool: one byte per element, non-zero = attend. The others are added to the scaled scores.
enum class MaskType : int32_t { kNone = 0, kBool = 1, kFloat32 = 2, kBFloat16 = 3, kFloat16 = 4, kFloat64 = 5 };

// A [batch, heads, rows, head_dim] tensor. Strides are in elements; the stride over head_dim is always 1.
// For packed (varlen) tensors [rows, heads, head_dim] stride_batch is 0 and a row index counts from the first token.
struct TensorView {
  void* data;  // nullptr: absent (an optional input, or a gradient nobody asked for)
  int64_t stride_batch;
  int64_t stride_head;
  int64_t stride_row;
};

// A [batch, heads_q, seq_q, seq_k] mask, strides in elements, 0 where it is broadcast.
struct MaskView {
  const void* data;
  int64_t stride_batch;
  int64_t stride_head;
  int64_t stride_query;
  int64_t stride_key;
  MaskType type;
};

// A log-sum-exp or other per-row statistic [batch, heads_q, rows] (varlen: [heads_q, rows], stride_batch 0). float32,
// float64 when the inputs are. The stride over rows is 1.
struct RowView {
  void* data;
  int64_t stride_batch;
  int64_t stride_head;
};

struct ZeroGateParams {
  // ---- sizes ----
  int64_t batch;          // sequences
  int64_t heads_q;        // a multiple of heads_kv; kv head of query head h: h / (heads_q / heads_kv)
  int64_t heads_kv;
  int64_t head_dim;
  int64_t seq_q;          // rows per sequence; varlen: the longest sequence (upper bound, sizes the grid)
  int64_t seq_k;
  int64_t total_q;        // rows that exist per batch entry in memory: seq_q; varlen: all packed tokens
  int64_t total_k;
  int64_t prefix_length;  // P, may be 0
  int64_t prefix_count;   // A, first dimension of prefix_key; 0 when there is no prefix
  DataType dtype;         // of every TensorView
  double scale;
  int32_t is_causal;      // bottom-right aligned: query i sees key j when j <= i + (keys - queries)
  int32_t deterministic;  // gradients must not depend on the order in which blocks run

  // ---- inputs ----
  TensorView query;         // [batch, heads_q, seq_q, head_dim]
  TensorView key;           // [batch, heads_kv, seq_k, head_dim]
  TensorView value;
  TensorView prefix_key;    // [prefix_count, heads_kv, prefix_length, head_dim]; stride_batch steps over prefix_count
  TensorView prefix_value;
  const void* gate;         // float32 (float64 when dtype is); value for prefix a and head h at
  int64_t gate_stride_prefix;  //   gate[a * gate_stride_prefix + h * gate_stride_head]; strides 0 where broadcast
  int64_t gate_stride_head;
  MaskView mask;            // never set for varlen
  // Optional int32 arrays, nullptr when absent. Values are clamped by the kernels wherever a bad one could cause an
  // access out of bounds: on a GPU nobody reads them on the host.
  const int32_t* key_start;     // [batch] first valid key of each sequence (default 0)
  const int32_t* key_end;       // [batch] one past the last valid key (default seq_k); moves the causal diagonal
  const int32_t* cu_seqlens_q;  // [batch + 1] offsets of the packed sequences; both or neither
  const int32_t* cu_seqlens_k;
  const int32_t* prefix_index;  // [batch] entry of the prefix table, -1 = no prefix. Absent: 0 when prefix_count == 1,
                                //   else the sequence's own number. Out of range on a GPU: the output row is NaN.

  // ---- forward: written; backward: read ----
  TensorView output;   // like query
  RowView logsumexp;   // of the word branch only; -inf where a row sees no key. May be absent in decode.

  // ---- backward ----
  TensorView doutput;        // like query
  TensorView dquery;         // written; data == nullptr where not asked for
  TensorView dkey;           // dkey and dvalue come together or not at all
  TensorView dvalue;
  TensorView dprefix_key;    // dprefix_key, dprefix_value and dgate come together or not at all
  TensorView dprefix_value;
  void* dgate;               // [prefix_count, heads_q] contiguous, float32 (float64 when dtype is)

  // Scratch memory of at least the bytes that the backend's *_workspace function asked for, 64-byte aligned.
  void* workspace;
};

}  // namespace lak
