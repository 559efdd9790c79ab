// Backward, by recomputation from the saved log-sum-exp (the gradients of arXiv 2303.16199, equations 5 to 8):
//
//   words:   P = exp(S - lse)   dP = dO V^T   dS = P (dP - D_w)        dV = P^T dO   dK = scale dS^T Q   dQ = scale dS K
//   prefix:  P_p softmax        dP_p = dO Vp^T   D_p = sum P_p dP_p    dS_p = gate P_p (dP_p - D_p)
//            dVp = gate P_p^T dO   dKp = scale dS_p^T Q   dQ += scale dS_p Kp   dgate = sum D_p
//   D_w = rowsum(dO O) - gate D_p
//
// One task owns some key blocks of one key/value head and walks over the query heads of its group and their query blocks:
// five products per pair of blocks, dK and dV summed in place. dQ of one task is a partial sum over its keys; partial sums
// are added in a fixed order at the end. The partition depends on the shape alone, so gradients are the same for every
// number of threads and every run.
//
// Scratch of a worker, for one query head: Q^T and dO^T by query block, Q and dO as the products want them (products.h), dQ;
// for its keys: dK and dV. O(sequence * head_dim), nothing of size sequence^2.
#include <limits>

#include "choose_products.h"
#include "kernel_table.h"

namespace lak::cpu::LAK_ISA {
namespace {

// How the work is cut: enough tasks for many cores, few partial dQ buffers.
struct Partition {
  int64_t key_splits, padded_queries, keys_per_split, padded_depth, padded_slots;
  bool words;  // any gradient of query, key or value is asked for
};

template <class C>
Partition partition_of(const ZeroGateParams& params) {
  constexpr int64_t kTasks = 32, kMostSplits = 4, kFewestBlocks = 4;
  Partition part;
  part.words = params.dquery.data || params.dkey.data;
  const int64_t key_blocks = (params.seq_k + kBlockKeys - 1) / kBlockKeys;
  const int64_t heads = larger(1, params.batch * params.heads_kv);
  part.key_splits = larger(1, smaller(smaller((kTasks + heads - 1) / heads, kMostSplits), key_blocks / kFewestBlocks));
  if (!part.words) part.key_splits = 1;
  part.padded_queries = round_up(params.seq_q, kBlockQueries);
  part.keys_per_split = (key_blocks + part.key_splits - 1) / part.key_splits * kBlockKeys;
  part.padded_depth = round_up(params.head_dim, kLanes<C>);
  part.padded_slots = params.prefix_count > 0 ? params.prefix_length : 0;
  return part;
}

// Partial sums of the prefix gradients, one entry per sequence and query head.
template <class C>
struct PrefixSums {
  C *dkey, *dvalue, *dgate;
  PrefixSums(Scratch& memory, const ZeroGateParams& params, const Partition& part) {
    const int64_t entries = params.dgate ? params.batch * params.heads_q : 0;
    dkey = memory.take<C>(entries * part.padded_slots * part.padded_depth);
    dvalue = memory.take<C>(entries * part.padded_slots * part.padded_depth);
    dgate = memory.take<C>(entries);
  }
};

template <class Products>
struct BackwardScratch {
  using C = typename Products::C;
  C *query_t, *doutput_t, *output_t, *query, *doutput, *dquery, *keys, *summed_keys, *values, *dkeys, *dvalues;
  C *scores, *dscores, *packed_weights, *logsumexp, *delta, *squared_noise;

  BackwardScratch(Scratch& memory, const ZeroGateParams& params, const Partition& part) {
    const int64_t rows = part.padded_queries * part.padded_depth, keys_rows = part.words ? part.keys_per_split : 0;
    query_t = memory.take<C>(part.padded_queries * params.head_dim);
    doutput_t = memory.take<C>(part.padded_queries * params.head_dim);
    output_t = memory.take<C>(kBlockQueries * params.head_dim);
    query = memory.take<C>(rows);
    doutput = memory.take<C>(rows);
    dquery = memory.take<C>(part.key_splits == 1 && params.dquery.data ? rows : 0);
    const int64_t block = round_up(larger(kBlockKeys, part.padded_slots), kBlockKeys);
    keys = memory.take<C>(block * part.padded_depth);
    summed_keys = Products::kCopiesDottedRows ? memory.take<C>(block * part.padded_depth) : keys;
    values = memory.take<C>(block * part.padded_depth);
    dkeys = memory.take<C>(params.dkey.data ? keys_rows * part.padded_depth : 0);
    dvalues = memory.take<C>(params.dkey.data ? keys_rows * part.padded_depth : 0);
    scores = memory.take<C>(block * kBlockQueries);
    dscores = memory.take<C>(block * kBlockQueries);
    packed_weights = memory.take<C>(Products::kPacksWeights ? block * kBlockQueries / 2 : 0);
    logsumexp = memory.take<C>(part.padded_queries);
    delta = memory.take<C>(part.padded_queries);
    squared_noise = memory.take<C>(part.padded_queries);
  }
};

// Where each part of the workspace begins.
template <class Products>
struct Workspace {
  using C = typename Products::C;
  int64_t scratch_bytes;
  C* dquery_parts;  // [batch, heads_q, key_splits][padded_queries][padded_depth], only when key_splits > 1
  PrefixSums<C> prefix;
  char* workers;
  int64_t bytes;

  Workspace(const ZeroGateParams& params, const Partition& part, int threads)
      : Workspace(Scratch(params.workspace), params, part, threads) {}

 private:
  Workspace(Scratch memory, const ZeroGateParams& params, const Partition& part, int threads)
      : scratch_bytes(one_scratch(params, part)),
        dquery_parts(
            memory.take<C>(part.key_splits > 1 && params.dquery.data
                               ? params.batch * params.heads_q * part.key_splits * part.padded_queries * part.padded_depth
                               : 0)),
        prefix(memory, params, part), workers(memory.take<char>(scratch_bytes * threads)), bytes(memory.used()) {}

  static int64_t one_scratch(const ZeroGateParams& params, const Partition& part) {
    Scratch counter(nullptr);
    BackwardScratch<Products> scratch(counter, params, part);
    return counter.used();
  }
};

// The key blocks of one split of one key/value head, and all query heads that use it.
template <class Products>
class BackwardTask {
  using T = typename Products::Storage;
  using C = typename Products::C;
  static constexpr int64_t kLane = kLanes<C>;
  static constexpr C kRoundingsOfSums = 12 * kRounding<C>;
  using DottedRows = decltype(Products::dotted_rows(nullptr, 0, 0, 0, nullptr));
  using SummedRows = decltype(Products::summed_rows(nullptr, 0, 0, 0, nullptr));

 public:
  BackwardTask(const ZeroGateParams& problem, const Partition& partition, const Workspace<Products>& workspace,
               const BackwardScratch<Products>& memory, int64_t b, int64_t kv_head, int64_t key_split)
      : params(problem), part(partition), work(workspace), scratch(memory), seq(sequence_of(problem, b)), batch(b),
        head_kv(kv_head), split(key_split), group(problem.heads_q / problem.heads_kv), depth(problem.head_dim),
        padded_depth(partition.padded_depth), scale(static_cast<C>(problem.scale)),
        blocks((seq.queries + kBlockQueries - 1) / kBlockQueries) {}

  void run() {
    if (params.dkey.data) {
      const int64_t elements = part.keys_per_split * padded_depth;
      for (int64_t i = 0; i < elements; ++i) scratch.dkeys[i] = scratch.dvalues[i] = 0;
    }
    for (int64_t head = head_kv * group; head < (head_kv + 1) * group; ++head) query_head(head);
    if (params.dkey.data) write_key_gradients();
  }

 private:
  int64_t first_key(int64_t round) const { return seq.key_begin + (round * part.key_splits + split) * kBlockKeys; }
  C* rows_of(C* buffer, int64_t block) const { return buffer + block * kBlockQueries * padded_depth; }

  void query_head(int64_t head) {
    dquery = !params.dquery.data    ? nullptr
             : part.key_splits == 1 ? scratch.dquery
                                    : work.dquery_parts + ((batch * params.heads_q + head) * part.key_splits + split) *
                                                              part.padded_queries * padded_depth;
    if (dquery) {
      for (int64_t i = 0; i < blocks * kBlockQueries * padded_depth; ++i) dquery[i] = 0;
    }
    load_rows(head);
    if (seq.prefix >= 0) prefix(head);
    if (part.words) {
      for (int64_t i = 0; i < blocks; ++i) mend_delta(head, i);
      for (int64_t round = 0; first_key(round) < seq.key_end; ++round) key_block(head, round);
    }
    if (dquery && part.key_splits == 1) {
      for (int64_t i = 0; i < seq.queries; ++i) {
        narrow_row(dquery + i * padded_depth, scale, depth, row_pointer<T>(params.dquery, batch, head, seq.first_query + i));
      }
    }
  }

  // Everything about the query rows of one head that key blocks read again and again.
  void load_rows(int64_t head) {
    const T* q = row_pointer<const T>(params.query, batch, head, seq.first_query);
    const T* dout = row_pointer<const T>(params.doutput, batch, head, seq.first_query);
    query_rows = Products::summed_rows(q, params.query.stride_row, seq.queries, depth, scratch.query);
    doutput_rows = Products::summed_rows(dout, params.doutput.stride_row, seq.queries, depth, scratch.doutput);
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t first = i * kBlockQueries, rows = smaller(kBlockQueries, seq.queries - first);
      Products::load_columns(q + first * params.query.stride_row, params.query.stride_row, rows, kBlockQueries, depth, scale,
                             scratch.query_t + first * depth);
      Products::load_columns(dout + first * params.doutput.stride_row, params.doutput.stride_row, rows, kBlockQueries, depth,
                             C(1), scratch.doutput_t + first * depth);
    }
    const C* saved = row_statistic<C>(params.logsumexp, batch, head, seq.first_query);
    for (int64_t i = 0; i < blocks * kBlockQueries; ++i) {
      // Rows that do not exist or saw no key: exp2(S - inf) makes every probability 0.
      const bool sees_keys = i < seq.queries && saved[i] != -__builtin_huge_val();
      scratch.logsumexp[i] = sees_keys ? saved[i] : C(__builtin_huge_val());
      scratch.delta[i] = 0;
    }
    for (int64_t i = 0; part.words && i < blocks; ++i) dot_with_output(head, i * kBlockQueries);
  }

  // delta = rowsum(dO O). Summed in the order in which dP = dO V^T is: where a query sees few keys, dP - D_w cancels, and
  // so do then the rounding errors of both. Its noise: five standard deviations of what rounding each element of O does to it,
  // and some roundings of the sums.
  void dot_with_output(int64_t head, int64_t first) {
    constexpr C kDeviations = 3 * kRounding<T> + kRoundingsOfSums;
    Products::load_columns(row_pointer<const T>(params.output, batch, head, seq.first_query + first), params.output.stride_row,
                           smaller(kBlockQueries, seq.queries - first), kBlockQueries, depth, C(1), scratch.output_t);
    for (int64_t m = 0; m < kBlockQueries; m += kLane) {
      const auto dots = Products::column_dots(scratch.output_t, scratch.doutput_t + first * depth, depth, m);
      store(scratch.delta + first + m, dots.sum);
      store(scratch.squared_noise + first + m, dots.squares * broadcast(kDeviations * kDeviations));
    }
  }

  void prefix(int64_t head) {
    const int64_t n = params.prefix_length;
    const bool write = params.dgate && split == 0;
    const C gate = gate_of<C>(params, seq.prefix, head);
    const T* keys = row_pointer<const T>(params.prefix_key, seq.prefix, head_kv, 0);
    const auto k = Products::dotted_rows(keys, params.prefix_key.stride_row, n, depth, scratch.keys);
    const auto v = Products::dotted_rows(row_pointer<const T>(params.prefix_value, seq.prefix, head_kv, 0),
                                         params.prefix_value.stride_row, n, depth, scratch.values);
    const auto summed_k = Products::summed_rows(keys, params.prefix_key.stride_row, n, depth, scratch.summed_keys);
    const int64_t entry = batch * params.heads_q + head, elements = n * padded_depth;
    C* dkey = write ? work.prefix.dkey + entry * elements : nullptr;
    C* dvalue = write ? work.prefix.dvalue + entry * elements : nullptr;
    for (int64_t i = 0; write && i < elements; ++i) dkey[i] = dvalue[i] = 0;
    Vec<C> dgate{};
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t first = i * kBlockQueries, rows = smaller(kBlockQueries, seq.queries - first);
      Products::dot(k, n, scratch.query_t + first * depth, kBlockQueries, depth, kNothingHidden, scale, scratch.scores);
      Products::dot(v, n, scratch.doutput_t + first * depth, kBlockQueries, depth, kNothingHidden, C(1), scratch.dscores);
      for (int64_t m = 0; m < kBlockQueries; m += kLane) dgate += prefix_softmax(m, n, first, gate);
      if (write) {
        add_to_keys(scratch.dscores, query_rows, n, first, rows, kNothingHidden, dkey);
        add_to_keys(scratch.scores, doutput_rows, n, first, rows, kNothingHidden, dvalue);
      }
      if (dquery && split == 0) add_to_dquery(summed_k, n, i, kNothingHidden);
    }
    if (write) work.prefix.dgate[entry] = horizontal_sum<C>(dgate);
  }

  // Turns scores and dP of the prefix into gate * P_p and dS_p for one vector of queries, takes gate * D_p from D_w, and
  // returns D_p.
  Vec<C> prefix_softmax(int64_t m, int64_t n, int64_t first, C gate) {
    const Vec<C> log2e = broadcast(static_cast<C>(kLog2E));
    Vec<C> highest = broadcast(C(-__builtin_huge_val())), sum{}, weighted{};
    for (int64_t t = 0; t < n; ++t) highest = maximum<C>(load(scratch.scores + t * kBlockQueries + m), highest);
    for (int64_t t = 0; t < n; ++t) {
      C* at = scratch.scores + t * kBlockQueries + m;
      const Vec<C> probability = exp2_nonpositive((load(at) - highest) * log2e);
      store(at, probability);
      sum += probability;
      weighted += probability * load(scratch.dscores + t * kBlockQueries + m);
    }
    const Vec<C> inverse = C(1) / sum, d_prefix = weighted * inverse, factor = broadcast(gate) * inverse;
    for (int64_t t = 0; t < n; ++t) {
      C* at = scratch.scores + t * kBlockQueries + m;
      C* d_at = scratch.dscores + t * kBlockQueries + m;
      const Vec<C> probability = load(at) * factor;
      store(at, probability);
      store(d_at, probability * (load(d_at) - d_prefix));
    }
    const Vec<C> in_output = broadcast(gate) * d_prefix, roundings = in_output * kRoundingsOfSums;
    store(scratch.delta + first + m, load(scratch.delta + first + m) - in_output);
    store(scratch.squared_noise + first + m, load(scratch.squared_noise + first + m) + roundings * roundings);
    return d_prefix;
  }

  // A row of O that overflowed its type (float16, mostly) leaves dO O without a meaning: D_w is then the sum of P dP over the
  // row's keys, which takes two more products.
  void mend_delta(int64_t head, int64_t block) {
    const int64_t q0 = block * kBlockQueries, rows = smaller(kBlockQueries, seq.queries - q0);
    const auto overflowed = [&](int64_t m) {
      return !(__builtin_fabs(scratch.delta[q0 + m]) <= std::numeric_limits<C>::max());
    };
    // Nor may lanes past the last query have a delta of NaN, from a prefix: they are the other half of the last query's pair.
    for (int64_t m = rows; m < kBlockQueries; ++m) scratch.delta[q0 + m] = 0;
    bool any = false;
    for (int64_t m = 0; m < rows; ++m) any = any || overflowed(m);
    if (!any) return;
    alignas(64) C p[kBlockQueries] = {}, p_dp[kBlockQueries] = {};
    for (int64_t k0 = seq.key_begin; k0 < seq.key_end; k0 += kBlockKeys) {
      const int64_t n = smaller(kBlockKeys, seq.key_end - k0), hidden = k0 - seq.diagonal - q0;
      scores_and_dp(head, k0, n, operands(k0, n), block);
      for (int64_t m = 0; m < rows; m += kLane) {
        const RowSums sums = probabilities(m, seen_keys(n, m + kLane, hidden), q0, hidden);
        store(p + m, load(p + m) + sums.p);
        store(p_dp + m, load(p_dp + m) + sums.p_dp);
      }
    }
    for (int64_t m = 0; m < rows; ++m) {
      if (overflowed(m)) scratch.delta[q0 + m] = p[m] == 0 ? C(0) : p_dp[m] / p[m];
    }
  }

  struct KeysAndValues {
    DottedRows keys, values;
  };
  KeysAndValues operands(int64_t k0, int64_t n) {
    const T* k = row_pointer<const T>(params.key, batch, head_kv, seq.first_key + k0);
    const T* v = row_pointer<const T>(params.value, batch, head_kv, seq.first_key + k0);
    return {Products::dotted_rows(k, params.key.stride_row, n, depth, scratch.keys),
            Products::dotted_rows(v, params.value.stride_row, n, depth, scratch.values)};
  }

  // S^T and dP^T of n keys from k0 on and one block of queries.
  void scores_and_dp(int64_t head, int64_t k0, int64_t n, const KeysAndValues& of, int64_t block) {
    const int64_t q0 = block * kBlockQueries, rows = smaller(kBlockQueries, seq.queries - q0);
    const int64_t padded_rows = round_up(rows, kLane), hidden = k0 - seq.diagonal - q0;
    Products::dot(of.keys, n, scratch.query_t + q0 * depth, padded_rows, depth, hidden, scale, scratch.scores);
    Products::dot(of.values, n, scratch.doutput_t + q0 * depth, padded_rows, depth, hidden, C(1), scratch.dscores);
    if (params.mask.type != MaskType::kNone) add_mask(params.mask, batch, head, q0, rows, k0, n, scratch.scores);
  }

  void key_block(int64_t head, int64_t round) {
    const int64_t k0 = first_key(round), n = smaller(kBlockKeys, seq.key_end - k0);
    const KeysAndValues of = operands(k0, n);
    const T* keys = row_pointer<const T>(params.key, batch, head_kv, seq.first_key + k0);
    const auto summed_k = Products::summed_rows(keys, params.key.stride_row, n, depth, scratch.summed_keys);
    const int64_t first_seeing = larger(0, k0 - seq.diagonal) / kBlockQueries;
    for (int64_t i = first_seeing; i < blocks; ++i) {
      const int64_t q0 = i * kBlockQueries, rows = smaller(kBlockQueries, seq.queries - q0), hidden = k0 - seq.diagonal - q0;
      scores_and_dp(head, k0, n, of, i);
      for (int64_t m = 0; m < rows; m += kLane) word_gradients(m, n, k0, q0, hidden);
      if (params.dkey.data) {
        C* dkey = scratch.dkeys + round * kBlockKeys * padded_depth;
        C* dvalue = scratch.dvalues + round * kBlockKeys * padded_depth;
        add_to_keys(scratch.scores, doutput_rows, n, q0, rows, hidden, dvalue);
        add_to_keys(scratch.dscores, query_rows, n, q0, rows, hidden, dkey);
      }
      if (dquery) add_to_dquery(summed_k, n, i, hidden);
    }
  }

  struct RowSums {
    Vec<C> p, p_dp;
  };
  // Scores of the keys that a vector of queries sees become P; returns the sums of P and of P dP over them.
  RowSums probabilities(int64_t m, int64_t seen, int64_t q0, int64_t hidden) {
    const Vec<C> log2e = broadcast(static_cast<C>(kLog2E)), logsumexp = load(scratch.logsumexp + q0 + m);
    const int64_t by_all = smaller(seen, larger(0, m - hidden + 1));
    RowSums sums{};
    for (int64_t t = 0; t < seen; ++t) {
      C* at = scratch.scores + t * kBlockQueries + m;
      Vec<C> probability = exp2_nonpositive((load(at) - logsumexp) * log2e);
      if (t >= by_all) probability = sees<C>(m, t, hidden) ? probability : Vec<C>{};
      store(at, probability);
      sums.p += probability;
      sums.p_dp += probability * load(scratch.dscores + t * kBlockQueries + m);
    }
    return sums;
  }

  // Scores become P, dP becomes dS = P (dP - D_w), for one vector of queries and the keys from k0 on.
  void word_gradients(int64_t m, int64_t n, int64_t k0, int64_t q0, int64_t hidden) {
    const int64_t seen = seen_keys(n, m + kLane, hidden);
    const RowSums sums = probabilities(m, seen, q0, hidden);
    // dP - D_w cancels where one key has nearly all of the probability, and D_w from dO O carries the rounding of O. Queries whose
    // keys are all in this block take D_w from the block itself. So does a query whose other keys have no weight that counts,
    // and whose two D_w differ by no more than that rounding: a row that sees one key, wherever it is, has a gradient of 0.
    const bool all_here = k0 == seq.key_begin && (k0 + n == seq.key_end || m + kLane - hidden <= n);
    const Vec<C> of_block = sums.p_dp / sums.p, saved = load(scratch.delta + q0 + m), apart = of_block - saved;
    auto take_block = sums.p >= broadcast(all_here ? std::numeric_limits<C>::min() : C(1) - kRounding<T> / 16);
    if (!all_here) take_block &= apart * apart <= load(scratch.squared_noise + q0 + m);
    const Vec<C> delta = take_block ? of_block : saved;
    for (int64_t t = 0; t < seen; ++t) {
      C* d_at = scratch.dscores + t * kBlockQueries + m;
      store(d_at, load(scratch.scores + t * kBlockQueries + m) * (load(d_at) - delta));
    }
    for (int64_t t = seen; t < n; ++t) {
      store(scratch.scores + t * kBlockQueries + m, Vec<C>{});
      store(scratch.dscores + t * kBlockQueries + m, Vec<C>{});
    }
  }

  // out[t] += sum over the queries m that see key t of weights[t][m] * rows[q0 + m].
  void add_to_keys(C* weights, const SummedRows& from, int64_t n, int64_t q0, int64_t rows, int64_t hidden, C* out) {
    const C* packed = Products::weights_for_queries(weights, n, round_up(rows, kLane), scratch.packed_weights);
    Products::sum_over_queries(packed, from, q0, n, rows, padded_depth, hidden, out);
  }

  // dQ[m] += sum_t dS[t][m] K[t], without scale. dS is not read again.
  void add_to_dquery(const SummedRows& k, int64_t n, int64_t block, int64_t hidden) {
    const int64_t rows = smaller(kBlockQueries, seq.queries - block * kBlockQueries);
    Products::sum_over_keys(Products::weights_for_keys(scratch.dscores, n, round_up(rows, kLane)), k, n, rows, padded_depth,
                            hidden, nullptr, rows_of(dquery, block));
  }

  void write_key_gradients() {
    for (int64_t round = 0; first_key(round) < seq.key_end; ++round) {
      const int64_t k0 = first_key(round), n = smaller(kBlockKeys, seq.key_end - k0);
      for (int64_t t = 0; t < n; ++t) {
        const int64_t row = seq.first_key + k0 + t, from = (round * kBlockKeys + t) * padded_depth;
        narrow_row(scratch.dkeys + from, scale, depth, row_pointer<T>(params.dkey, batch, head_kv, row));
        narrow_row(scratch.dvalues + from, C(1), depth, row_pointer<T>(params.dvalue, batch, head_kv, row));
      }
    }
    if (split != 0) return;
    for (int64_t j = 0; j < seq.keys; ++j) {  // keys outside of the window
      if (j == seq.key_begin && seq.key_begin < seq.key_end) j = seq.key_end;
      if (j >= seq.keys) break;
      T* dkey = row_pointer<T>(params.dkey, batch, head_kv, seq.first_key + j);
      T* dvalue = row_pointer<T>(params.dvalue, batch, head_kv, seq.first_key + j);
      for (int64_t d = 0; d < depth; ++d) narrow(C(0), dkey[d]), narrow(C(0), dvalue[d]);
    }
  }

  const ZeroGateParams& params;
  const Partition& part;
  const Workspace<Products>& work;
  const BackwardScratch<Products>& scratch;
  const Sequence seq;
  const int64_t batch, head_kv, split, group, depth, padded_depth;
  const C scale;
  const int64_t blocks;
  SummedRows query_rows{}, doutput_rows{};
  C* dquery = nullptr;
};

// dQ of one query head = scale * the partial sums of its key splits, in order.
template <class Products>
void add_dquery_parts(const ZeroGateParams& params, const Partition& part, const Workspace<Products>& work, int64_t task) {
  using T = typename Products::Storage;
  using C = typename Products::C;
  const int64_t b = task / params.heads_q, head = task % params.heads_q, size = part.padded_queries * part.padded_depth;
  const Sequence seq = sequence_of(params, b);
  C* sums = work.dquery_parts + task * part.key_splits * size;
  for (int64_t i = 0; i < seq.queries; ++i) {
    C* row = sums + i * part.padded_depth;
    for (int64_t split = 1; split < part.key_splits; ++split) {
      for (int64_t d = 0; d < part.padded_depth; ++d) row[d] += row[split * size + d];
    }
    narrow_row(row, static_cast<C>(params.scale), params.head_dim, row_pointer<T>(params.dquery, b, head, seq.first_query + i));
  }
}

// Gradients of one entry of the prefix table and one key/value head: over all sequences that used it, in order.
template <class Products>
void add_prefix_parts(const ZeroGateParams& params, const Partition& part, const Workspace<Products>& work, int64_t task,
                      typename Products::C* row) {
  using T = typename Products::Storage;
  using C = typename Products::C;
  const int64_t entry = task / params.heads_kv, head_kv = task % params.heads_kv, group = params.heads_q / params.heads_kv;
  const int64_t elements = params.prefix_length * part.padded_depth;
  for (int64_t slot = 0; slot < params.prefix_length; ++slot) {
    for (int which = 0; which < 2; ++which) {
      const bool is_key = which == 0;
      for (int64_t d = 0; d < part.padded_depth; ++d) row[d] = 0;
      for (int64_t b = 0; b < params.batch; ++b) {
        if (sequence_of(params, b).prefix != entry) continue;
        for (int64_t head = head_kv * group; head < (head_kv + 1) * group; ++head) {
          const C* from = (is_key ? work.prefix.dkey : work.prefix.dvalue) + (b * params.heads_q + head) * elements +
                          slot * part.padded_depth;
          for (int64_t d = 0; d < part.padded_depth; ++d) row[d] += from[d];
        }
      }
      narrow_row(row, is_key ? static_cast<C>(params.scale) : C(1), params.head_dim,
                 row_pointer<T>(is_key ? params.dprefix_key : params.dprefix_value, entry, head_kv, slot));
    }
  }
  C* dgate = static_cast<C*>(params.dgate) + entry * params.heads_q;
  for (int64_t head = head_kv * group; head < (head_kv + 1) * group; ++head) {
    dgate[head] = 0;
    for (int64_t b = 0; b < params.batch; ++b) {
      if (sequence_of(params, b).prefix == entry) dgate[head] += work.prefix.dgate[b * params.heads_q + head];
    }
  }
}

template <class Products>
void backward_with(const ZeroGateParams& params, const Parallel& parallel) {
  using C = typename Products::C;
  const Partition part = partition_of<C>(params);
  const Workspace<Products> work(params, part, parallel.threads);
  run_tasks(parallel, params.batch * params.heads_kv * part.key_splits, [&](int64_t task, int64_t worker) {
    [[maybe_unused]] const typename Products::Registers registers;
    Scratch memory(work.workers + worker * work.scratch_bytes);
    const BackwardScratch<Products> scratch(memory, params, part);
    const int64_t split = task % part.key_splits, head = task / part.key_splits % params.heads_kv;
    BackwardTask<Products>(params, part, work, scratch, task / part.key_splits / params.heads_kv, head, split).run();
  });
  if (part.key_splits > 1 && params.dquery.data) {
    run_tasks(parallel, params.batch * params.heads_q,
              [&](int64_t task, int64_t) { add_dquery_parts(params, part, work, task); });
  }
  if (params.dgate) {
    run_tasks(parallel, params.prefix_count * params.heads_kv, [&](int64_t task, int64_t worker) {
      add_prefix_parts(params, part, work, task, reinterpret_cast<C*>(work.workers + worker * work.scratch_bytes));
    });
  }
}

}  // namespace

int64_t backward_workspace(const ZeroGateParams& params, int threads) {
  return with_products(params, [&](auto products) {
    ZeroGateParams counted = params;
    counted.workspace = nullptr;
    return Workspace<decltype(products)>(counted, partition_of<typename decltype(products)::C>(counted), threads).bytes;
  });
}

void backward(const ZeroGateParams& params, const Parallel& parallel) {
  with_products(params, [&](auto products) {
    backward_with<decltype(products)>(params, parallel);
    return 0;
  });
}

}  // namespace lak::cpu::LAK_ISA
