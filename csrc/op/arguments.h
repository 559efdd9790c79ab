// From an op's arguments to ZeroGateParams: the checks that every C++ backend shares, done once, at the op boundary.
#pragma once

#include <algorithm>
#include <tuple>

#include "op/tensors.h"
#include "zero_gate_params.h"

namespace lak {

// What every op takes, in the order of the schemas: Inputs first, then Options, of which decode has a part.
struct Inputs {
  using Types = std::tuple<Tensor, Tensor, Tensor, OptionalTensor, OptionalTensor, OptionalTensor>;
  Tensor query, key, value;
  OptionalTensor prefix_key, prefix_value, gate;
};

struct Options {
  using Types = std::tuple<OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor,
                           int64_t, int64_t, double, bool>;
  OptionalTensor attn_mask, key_start, key_end, prefix_index, cu_seqlens_q, cu_seqlens_k;
  int64_t max_seqlen_q, max_seqlen_k;
  double scale;
  bool is_causal;
};

// Holds the copies that `prepared` makes alive for as long as params is used.
struct OpArguments : Inputs, Options {
  bool packed() const { return cu_seqlens_q.has_value(); }

  // Checks everything that does not need the values of an integer tensor, and fills all but the outputs. `prepared` gives a
  // tensor in a layout that the backend's kernels read: the tensor itself, or a copy.
  template <class Prepare>
  ZeroGateParams params(const Prepare& prepared) {
    const int64_t rank = packed() ? 3 : 4;
    LAK_CHECK(cu_seqlens_q.has_value() == cu_seqlens_k.has_value(), "cu_seqlens_q, cu_seqlens_k: expected both or neither");
    LAK_CHECK(query.dim() == rank, "query: expected ", rank, " dimensions, got shape ", shape_of(query));
    LAK_CHECK(key.dim() == rank, "key: expected ", rank, " dimensions, got shape ", shape_of(key));

    ZeroGateParams p{};
    p.dtype = data_type_of(query, "query");
    p.scale = scale;
    p.is_causal = is_causal;
    p.heads_q = query.size(1);
    p.heads_kv = key.size(1);
    p.head_dim = query.size(rank - 1);
    p.total_q = query.size(rank - 3 + (packed() ? 0 : 1));
    p.total_k = key.size(rank - 3 + (packed() ? 0 : 1));
    if (packed()) {
      LAK_CHECK(cu_seqlens_q->dim() == 1 && cu_seqlens_q->size(0) >= 1, "cu_seqlens_q: expected shape [batch + 1], got ",
                shape_of(*cu_seqlens_q));
      LAK_CHECK(max_seqlen_q >= 0, "max_seqlen_q: expected >= 0, got ", max_seqlen_q);
      LAK_CHECK(max_seqlen_k >= 0, "max_seqlen_k: expected >= 0, got ", max_seqlen_k);
      LAK_CHECK(!key_start && !key_end, "key_start, key_end: not used with packed sequences");
      LAK_CHECK(!attn_mask, "attn_mask: not used with packed sequences");
      p.batch = cu_seqlens_q->size(0) - 1;
      // A generous bound costs nothing: no sequence is longer than all of them together.
      p.seq_q = std::min(max_seqlen_q, p.total_q);
      p.seq_k = std::min(max_seqlen_k, p.total_k);
      check_shape(key, "key", {p.total_k, p.heads_kv, p.head_dim});
      check_shape(value, "value", {p.total_k, p.heads_kv, p.head_dim});
    } else {
      p.batch = query.size(0);
      p.seq_q = p.total_q;
      p.seq_k = p.total_k;
      check_shape(key, "key", {p.batch, p.heads_kv, p.seq_k, p.head_dim});
      check_shape(value, "value", {p.batch, p.heads_kv, p.seq_k, p.head_dim});
    }
    LAK_CHECK(p.head_dim >= 1, "query: expected head_dim >= 1, got shape ", shape_of(query));
    LAK_CHECK(p.heads_q >= 1, "query: expected at least one head, got shape ", shape_of(query));
    LAK_CHECK(p.heads_kv >= 1 && p.heads_q % p.heads_kv == 0, "key: expected a number of heads that divides the ", p.heads_q,
              " of query, got ", p.heads_kv);
    check_like(key, "key", query);
    check_like(value, "value", query);
    p.query = view_of(query = prepared(query));
    p.key = view_of(key = prepared(key));
    p.value = view_of(value = prepared(value));

    fill_prefix(p, prepared);
    if (attn_mask) {
      LAK_CHECK(attn_mask->device() == query.device(), "attn_mask: expected the device of query");
      check_shape(*attn_mask, "attn_mask", {p.batch, p.heads_q, p.seq_q, p.seq_k});
      p.mask = mask_view_of(*attn_mask);
    }
    p.key_start = int32_data(key_start, "key_start", p.batch, query);
    p.key_end = int32_data(key_end, "key_end", p.batch, query);
    p.cu_seqlens_q = int32_data(cu_seqlens_q, "cu_seqlens_q", p.batch + 1, query);
    p.cu_seqlens_k = int32_data(cu_seqlens_k, "cu_seqlens_k", p.batch + 1, query);
    return p;
  }

 private:
  template <class Prepare>
  void fill_prefix(ZeroGateParams& p, const Prepare& prepared) {
    LAK_CHECK(prefix_key.has_value() == prefix_value.has_value() && prefix_key.has_value() == gate.has_value(),
              "prefix_key, prefix_value, gate: expected all three or none");
    if (!prefix_key) {
      LAK_CHECK(!prefix_index, "prefix_index: expected a prefix to choose from");
      return;
    }
    LAK_CHECK(prefix_key->dim() == 4, "prefix_key: expected 4 dimensions, got shape ", shape_of(*prefix_key));
    p.prefix_count = prefix_key->size(0);
    p.prefix_length = prefix_key->size(2);
    check_shape(*prefix_key, "prefix_key", {p.prefix_count, p.heads_kv, p.prefix_length, p.head_dim});
    check_shape(*prefix_value, "prefix_value", {p.prefix_count, p.heads_kv, p.prefix_length, p.head_dim});
    check_shape(*gate, "gate", {p.prefix_count, p.heads_q});
    check_like(*prefix_key, "prefix_key", query);
    check_like(*prefix_value, "prefix_value", query);
    LAK_CHECK(gate->scalar_type() == accumulator_type(query), "gate: expected float32, or float64 for a float64 query, got ",
              dtype_of(*gate));
    LAK_CHECK(gate->device() == query.device(), "gate: expected the device of query");
    if (prefix_index) {
      LAK_CHECK(p.prefix_count >= 1, "prefix_key: expected at least one entry, got shape ", shape_of(*prefix_key));
    } else {
      LAK_CHECK(p.prefix_count == 1 || p.prefix_count == p.batch, "prefix_key: expected a first dimension of 1 or ", p.batch,
                " (one per sequence), or a prefix_index into the table; got shape ", shape_of(*prefix_key));
    }
    p.prefix_key = view_of(*(prefix_key = prepared(*prefix_key)));
    p.prefix_value = view_of(*(prefix_value = prepared(*prefix_value)));
    p.prefix_index = int32_data(prefix_index, "prefix_index", p.batch, query);
    p.gate = gate->const_data_ptr();
    p.gate_stride_prefix = gate->stride(0);
    p.gate_stride_head = gate->stride(1);
  }
};

}  // namespace lak
