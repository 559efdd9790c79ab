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

    ZeroGateParams params{};
    params.dtype = data_type_of(query, "query");
    params.scale = scale;
    params.is_causal = is_causal;
    params.heads_q = query.size(1);
    params.heads_kv = key.size(1);
    params.head_dim = query.size(rank - 1);
    params.total_q = query.size(rank - 3 + (packed() ? 0 : 1));
    params.total_k = key.size(rank - 3 + (packed() ? 0 : 1));
    if (packed()) {
      LAK_CHECK(cu_seqlens_q->dim() == 1 && cu_seqlens_q->size(0) >= 1, "cu_seqlens_q: expected shape [batch + 1], got ",
                shape_of(*cu_seqlens_q));
      LAK_CHECK(max_seqlen_q >= 0, "max_seqlen_q: expected >= 0, got ", max_seqlen_q);
      LAK_CHECK(max_seqlen_k >= 0, "max_seqlen_k: expected >= 0, got ", max_seqlen_k);
      LAK_CHECK(!key_start && !key_end, "key_start, key_end: not used with packed sequences");
      LAK_CHECK(!attn_mask, "attn_mask: not used with packed sequences");
      params.batch = cu_seqlens_q->size(0) - 1;
      // A generous bound costs nothing: no sequence is longer than all of them together.
      params.seq_q = std::min(max_seqlen_q, params.total_q);
      params.seq_k = std::min(max_seqlen_k, params.total_k);
      check_shape(key, "key", {params.total_k, params.heads_kv, params.head_dim});
      check_shape(value, "value", {params.total_k, params.heads_kv, params.head_dim});
    } else {
      params.batch = query.size(0);
      params.seq_q = params.total_q;
      params.seq_k = params.total_k;
      check_shape(key, "key", {params.batch, params.heads_kv, params.seq_k, params.head_dim});
      check_shape(value, "value", {params.batch, params.heads_kv, params.seq_k, params.head_dim});
    }
    LAK_CHECK(params.head_dim >= 1, "query: expected head_dim >= 1, got shape ", shape_of(query));
    LAK_CHECK(params.heads_q >= 1, "query: expected at least one head, got shape ", shape_of(query));
    LAK_CHECK(params.heads_kv >= 1 && params.heads_q % params.heads_kv == 0,
              "key: expected a number of heads that divides the ", params.heads_q, " of query, got ", params.heads_kv);
    check_like(key, "key", query);
    check_like(value, "value", query);
    params.query = view_of(query = prepared(query));
    params.key = view_of(key = prepared(key));
    params.value = view_of(value = prepared(value));

    fill_prefix(params, prepared);
    if (attn_mask) {
      LAK_CHECK(attn_mask->device() == query.device(), "attn_mask: expected the device of query");
      check_shape(*attn_mask, "attn_mask", {params.batch, params.heads_q, params.seq_q, params.seq_k});
      params.mask = mask_view_of(*attn_mask);
    }
    params.key_start = int32_data(key_start, "key_start", params.batch, query);
    params.key_end = int32_data(key_end, "key_end", params.batch, query);
    params.cu_seqlens_q = int32_data(cu_seqlens_q, "cu_seqlens_q", params.batch + 1, query);
    params.cu_seqlens_k = int32_data(cu_seqlens_k, "cu_seqlens_k", params.batch + 1, query);
    return params;
  }

 private:
  template <class Prepare>
  void fill_prefix(ZeroGateParams& params, const Prepare& prepared) {
    LAK_CHECK(prefix_key.has_value() == prefix_value.has_value() && prefix_key.has_value() == gate.has_value(),
              "prefix_key, prefix_value, gate: expected all three or none");
    if (!prefix_key) {
      LAK_CHECK(!prefix_index, "prefix_index: expected a prefix to choose from");
      return;
    }
    LAK_CHECK(prefix_key->dim() == 4, "prefix_key: expected 4 dimensions, got shape ", shape_of(*prefix_key));
    params.prefix_count = prefix_key->size(0);
    params.prefix_length = prefix_key->size(2);
    check_shape(*prefix_key, "prefix_key", {params.prefix_count, params.heads_kv, params.prefix_length, params.head_dim});
    check_shape(*prefix_value, "prefix_value", {params.prefix_count, params.heads_kv, params.prefix_length, params.head_dim});
    check_shape(*gate, "gate", {params.prefix_count, params.heads_q});
    check_like(*prefix_key, "prefix_key", query);
    check_like(*prefix_value, "prefix_value", query);
    LAK_CHECK(gate->scalar_type() == accumulator_type(query), "gate: expected float32, or float64 for a float64 query, got ",
              dtype_of(*gate));
    LAK_CHECK(gate->device() == query.device(), "gate: expected the device of query");
    if (prefix_index) {
      LAK_CHECK(params.prefix_count >= 1, "prefix_key: expected at least one entry, got shape ", shape_of(*prefix_key));
    } else {
      LAK_CHECK(params.prefix_count == 1 || params.prefix_count == params.batch,
                "prefix_key: expected a first dimension of 1 or ", params.batch,
                " (one per sequence), or a prefix_index into the table; got shape ", shape_of(*prefix_key));
    }
    params.prefix_key = view_of(*(prefix_key = prepared(*prefix_key)));
    params.prefix_value = view_of(*(prefix_value = prepared(*prefix_value)));
    params.prefix_index = int32_data(prefix_index, "prefix_index", params.batch, query);
    params.gate = gate->const_data_ptr();
    params.gate_stride_prefix = gate->stride(0);
    params.gate_stride_head = gate->stride(1);
  }
};

}  // namespace lak
