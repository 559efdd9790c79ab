// Forward: output = softmax(scale Q K^T) V + gate * softmax(scale Q Kp^T) Vp, and the log-sum-exp of the word branch.
//
// One task is a block of kBlockQueries query rows of one head. For each block of keys it computes S^T = K Q^T, keeps a
// running maximum and sum per query (online softmax, base 2), and adds P V to one accumulator. The prefix comes last: its
// probabilities, scaled by gate * l / l_p (l, l_p: row sums of the word and prefix branch), go into the SAME accumulator,
// so that one division by l ends both softmaxes.
//
// Scratch of a worker: Q^T [head_dim][queries], S^T [keys][queries], accumulator [queries][head_dim], and the key and
// value block as floats where storage is narrower. At head_dim 64 and 128 the tiles in use together fit the L1/L2 cache.
#include <type_traits>

#include "kernel_table.h"
#include "pairs.h"
#include "scores.h"

namespace lak::cpu::LAK_ISA {
namespace {

template <class T>
struct ForwardScratch {
  using C = Compute<T>;
  C *query_t, *scores, *accumulator, *keys, *values, *maximum, *sum, *rescale;

  ForwardScratch(Scratch& s, int64_t head_dim) {
    const int64_t padded = round_up(head_dim, kLanes<C>);
    query_t = s.take<C>(head_dim * kBlockQueries);
    scores = s.take<C>(kBlockKeys * kBlockQueries);
    accumulator = s.take<C>(kBlockQueries * padded);
    keys = s.take<C>(kBlockKeys * padded);
    values = s.take<C>(kBlockKeys * padded);
    maximum = s.take<C>(kBlockQueries);
    sum = s.take<C>(kBlockQueries);
    rescale = s.take<C>(kBlockQueries);
  }
};

// One block of query rows of one head.
template <class T>
class ForwardBlock {
  using C = Compute<T>;
  static constexpr int64_t kLane = kLanes<C>;
  static constexpr C kMinusInfinity = -__builtin_huge_val();
  static constexpr bool kMayPair = LAK_HAS_PAIRS && std::is_same_v<T, BFloat16>;

 public:
  ForwardBlock(const ZeroGateParams& params, const Sequence& sequence, int64_t b, int64_t head, int64_t first,
               const ForwardScratch<T>& scratch)
      : p(params), seq(sequence), batch(b), head_q(head), head_kv(head / (params.heads_q / params.heads_kv)), q0(first),
        rows(smaller(kBlockQueries, sequence.queries - first)), padded_rows(round_up(rows, kLane)), depth(params.head_dim),
        padded_depth(round_up(params.head_dim, kLane)), in_pairs(kMayPair && params.head_dim % 2 == 0), s(scratch) {}

  void run() {
    load_queries(row_pointer<const T>(p.query, batch, head_q, seq.first_query + q0));
    for (int64_t i = 0; i < padded_rows; ++i) s.maximum[i] = kMinusInfinity, s.sum[i] = 0;
    for (int64_t i = 0; i < rows * padded_depth; ++i) s.accumulator[i] = 0;
    const int64_t end = visible_end(seq, q0 + rows - 1);
    for (int64_t k0 = seq.key_begin; k0 < end; k0 += kBlockKeys) words(k0, smaller(kBlockKeys, end - k0));
    write_logsumexp();
    if (seq.prefix >= 0) prefix();
    write_output();
  }

 private:
  void load_queries(const T* from) {
#if LAK_HAS_PAIRS
    if constexpr (kMayPair) {
      uint32_t* to = reinterpret_cast<uint32_t*>(s.query_t);
      if (in_pairs) return transpose_pairs(from, p.query.stride_row, rows, padded_rows, depth, to, kBlockQueries);
    }
#endif
    transpose(from, p.query.stride_row, rows, padded_rows, depth, static_cast<C>(p.scale), s.query_t, kBlockQueries);
  }

  // S^T of n keys.
  void score(const T* keys, int64_t stride, int64_t n, int64_t hidden) {
#if LAK_HAS_PAIRS
    if constexpr (kMayPair) {
      if (in_pairs) return score_pairs(keys, stride, n, hidden);
    }
#endif
    key_query_products(dense_rows<T, C>(keys, stride, n, depth, s.keys), n, s.query_t, padded_rows, depth, hidden, s.scores);
  }

  // S^T for keys [k0, k0 + n) and the online softmax step, then accumulator += P V.
  void words(int64_t k0, int64_t n) {
    const int64_t hidden = k0 - seq.diagonal - q0;
    const bool crosses_diagonal = hidden + n - 1 > 0;
    score(row_pointer<const T>(p.key, batch, head_kv, seq.first_key + k0), p.key.stride_row, n, hidden);
    if (p.mask.type != MaskType::kNone) add_mask(p.mask, batch, head_q, q0, rows, k0, n, s.scores);
    if (crosses_diagonal) {
      for (int64_t m = 0; m < padded_rows; m += kLane) {
        const int64_t seen = seen_keys(n, m + kLane, hidden);
        for (int64_t t = larger(0, m - hidden); t < seen; ++t) {  // keys before are seen by every lane
          C* row = s.scores + t * kBlockQueries + m;
          store(row, sees<C>(m, t, hidden) ? load(row) : broadcast(kMinusInfinity));
        }
        softmax_step<1>(m, seen);
        for (int64_t t = seen; t < n; ++t) store(s.scores + t * kBlockQueries + m, Vec<C>{});
      }
    } else {
      int64_t m = 0;
      for (; m + kTileVecs * kLane <= padded_rows; m += kTileVecs * kLane) softmax_step<kTileVecs>(m, n);
      for (; m < padded_rows; m += kLane) softmax_step<1>(m, n);
    }
    accumulate(row_pointer<const T>(p.value, batch, head_kv, seq.first_key + k0), p.value.stride_row, n, s.rescale, hidden);
  }

  // Scores of n keys become probabilities relative to the new running maximum; rescale says what became of the old one.
  // The difference comes before the factor log2(e): it is exact near the maximum, whose probability is exactly 1.
  template <int VECS>
  void softmax_step(int64_t m, int64_t n) {
    const Vec<C> log2e = broadcast(static_cast<C>(kLog2E));
    Vec<C> highest[VECS], total[VECS], reference[VECS];
    for (int v = 0; v < VECS; ++v) highest[v] = broadcast(kMinusInfinity);
    for (int64_t t = 0; t < n; ++t)
      for (int v = 0; v < VECS; ++v)
        highest[v] = maximum<C>(load(s.scores + t * kBlockQueries + m + v * kLane), highest[v]);
    for (int v = 0; v < VECS; ++v) {
      highest[v] = maximum<C>(highest[v], load(s.maximum + m + v * kLane));
      // A query that has seen nothing yet: any finite reference keeps -inf - reference at -inf.
      reference[v] = highest[v] == broadcast(kMinusInfinity) ? Vec<C>{} : highest[v];
      const Vec<C> rescale = exp2_nonpositive((load(s.maximum + m + v * kLane) - reference[v]) * log2e);
      store(s.rescale + m + v * kLane, rescale);
      store(s.maximum + m + v * kLane, highest[v]);
      total[v] = load(s.sum + m + v * kLane) * rescale;
    }
    for (int64_t t = 0; t < n; ++t) {
      for (int v = 0; v < VECS; ++v) {
        C* at = s.scores + t * kBlockQueries + m + v * kLane;
        const Vec<C> probability = exp2_nonpositive((load(at) - reference[v]) * log2e);
        store(at, probability);
        total[v] += probability;
      }
    }
    for (int v = 0; v < VECS; ++v) store(s.sum + m + v * kLane, total[v]);
  }

  // accumulator[m] = rescale[m] * accumulator[m] + sum_t P[t][m] V[t]; query m sees keys up to m - hidden.
  void accumulate(const T* values, int64_t stride, int64_t n, const C* rescale, int64_t hidden) {
#if LAK_HAS_PAIRS
    if constexpr (kMayPair) {
      if (in_pairs) return accumulate_pairs(values, stride, n, rescale, hidden);
    }
#endif
    const auto v = dense_rows<T, C>(values, stride, n, depth, s.values);
    for (int64_t m = 0; m < rows; m += kTileRows) {
      const int64_t tile_rows = smaller(kTileRows, rows - m);
      const int64_t seen = seen_keys(n, m + tile_rows, hidden);
      for (int64_t d = 0; d < padded_depth; d += kTileVecs * kLane) {
        const int64_t vecs = smaller(kTileVecs, (padded_depth - d) / kLane);
        tile_function<ColumnByColumns, C>(tile_rows, vecs)(s.scores + m, kBlockQueries, v.data + d, v.stride, seen,
                                                           s.accumulator + m * padded_depth + d, padded_depth,
                                                           rescale ? rescale + m : nullptr);
      }
    }
  }

#if LAK_HAS_PAIRS
  void score_pairs(const BFloat16* keys, int64_t stride, int64_t n, int64_t hidden) {
    const uint32_t* queries = reinterpret_cast<const uint32_t*>(s.query_t);
    for (int64_t t = 0; t < n; t += kTileRows) {
      const int64_t tile_rows = smaller(kTileRows, n - t);
      const int64_t m0 = smaller(larger(hidden + t, 0), padded_rows) / kLane * kLane;
      for (int64_t m = m0; m < padded_rows; m += kTileVecs * kLane) {
        const int64_t vecs = smaller(kTileVecs, (padded_rows - m) / kLane);
        pair_tile_function<PairRowByColumns>(tile_rows, vecs)(keys + t * stride, stride, queries + m, kBlockQueries, depth,
                                                              static_cast<C>(p.scale), s.scores + t * kBlockQueries + m,
                                                              kBlockQueries);
      }
    }
  }

  void accumulate_pairs(const BFloat16* values, int64_t stride, int64_t n, const C* rescale, int64_t hidden) {
    uint32_t* v = reinterpret_cast<uint32_t*>(s.values);
    interleave_rows(values, stride, n, depth, padded_depth, v);
    pack_probabilities(s.scores, n, padded_rows, kBlockQueries);
    const uint32_t* probabilities = reinterpret_cast<const uint32_t*>(s.scores);
    for (int64_t m = 0; m < rows; m += kTileRows) {
      const int64_t tile_rows = smaller(kTileRows, rows - m);
      const int64_t pairs = (seen_keys(n, m + tile_rows, hidden) + 1) / 2;
      for (int64_t d = 0; d < padded_depth; d += kTileVecs * kLane) {
        const int64_t vecs = smaller(kTileVecs, (padded_depth - d) / kLane);
        pair_tile_function<PairColumnByColumns>(tile_rows, vecs)(probabilities + m, kBlockQueries, v + d, padded_depth, pairs,
                                                                 s.accumulator + m * padded_depth + d, padded_depth,
                                                                 rescale ? rescale + m : nullptr);
      }
    }
  }
#endif

  // S_p^T for prefix slots [slot, slot + n).
  void prefix_scores(int64_t slot, int64_t n) {
    score(row_pointer<const T>(p.prefix_key, seq.prefix, head_kv, slot), p.prefix_key.stride_row, n, kNothingHidden);
  }

  void prefix() {
    // The word branch's sums stay in s.sum; the prefix has its own maximum and sum, found before anything is added.
    alignas(64) C sum[kBlockQueries];
    for (int64_t m = 0; m < padded_rows; ++m) {
      sum[m] = s.sum[m] == 0 ? C(1) : s.sum[m];  // a row that saw no key: O = gate * O_p
      s.maximum[m] = kMinusInfinity, s.sum[m] = 0;
    }
    const int64_t slots = p.prefix_length;
    const bool one_tile = slots <= kBlockKeys;
    for (int64_t slot = 0; slot < slots; slot += kBlockKeys) {
      const int64_t n = smaller(kBlockKeys, slots - slot);
      prefix_scores(slot, n);
      for (int64_t m = 0; m < padded_rows; m += kLane) softmax_step<1>(m, n);
    }
    const C gate = gate_of<C>(p, seq.prefix, head_q);
    const Vec<C> log2e = broadcast(static_cast<C>(kLog2E));
    for (int64_t slot = 0; slot < slots; slot += kBlockKeys) {
      const int64_t n = smaller(kBlockKeys, slots - slot);
      if (!one_tile) prefix_scores(slot, n);
      for (int64_t m = 0; m < padded_rows; m += kLane) {
        const Vec<C> factor = broadcast(gate) * load(sum + m) / load(s.sum + m);
        const Vec<C> highest = load(s.maximum + m);
        for (int64_t t = 0; t < n; ++t) {
          C* at = s.scores + t * kBlockQueries + m;
          store(at, (one_tile ? load(at) : exp2_nonpositive((load(at) - highest) * log2e)) * factor);
        }
      }
      accumulate(row_pointer<const T>(p.prefix_value, seq.prefix, head_kv, slot), p.prefix_value.stride_row, n, nullptr,
                 kNothingHidden);
    }
    for (int64_t m = 0; m < padded_rows; ++m) s.sum[m] = sum[m];
  }

  void write_logsumexp() {
    if (!p.logsumexp.data) return;
    C* out = row_statistic<C>(p.logsumexp, batch, head_q, seq.first_query + q0);
    for (int64_t m = 0; m < rows; ++m) {
      out[m] = s.sum[m] == 0 ? kMinusInfinity : static_cast<C>(s.maximum[m] + __builtin_log(static_cast<double>(s.sum[m])));
    }
  }

  void write_output() {
    for (int64_t m = 0; m < rows; ++m) {
      const C factor = s.sum[m] == 0 ? C(0) : C(1) / s.sum[m];
      narrow_row(s.accumulator + m * padded_depth, factor, depth,
                 row_pointer<T>(p.output, batch, head_q, seq.first_query + q0 + m));
    }
  }

  const ZeroGateParams& p;
  const Sequence& seq;
  const int64_t batch, head_q, head_kv, q0, rows, padded_rows, depth, padded_depth;
  const bool in_pairs;
  const ForwardScratch<T>& s;
};

template <class T>
int64_t scratch_bytes(int64_t head_dim) {
  Scratch counter(nullptr);
  ForwardScratch<T> scratch(counter, head_dim);
  return counter.used();
}

template <class T>
void forward_typed(const ZeroGateParams& p, const Parallel& parallel) {
  const int64_t blocks = (p.seq_q + kBlockQueries - 1) / kBlockQueries;
  const int64_t bytes = scratch_bytes<T>(p.head_dim);
  run_tasks(parallel, p.batch * p.heads_q * blocks, [&](int64_t task, int64_t worker) {
    // The blocks of one head follow each other, so that its keys and values stay in cache; the last, longest one first.
    const int64_t block = blocks - 1 - task % blocks, head = task / blocks % p.heads_q, b = task / blocks / p.heads_q;
    const Sequence sequence = sequence_of(p, b);
    if (block * kBlockQueries >= sequence.queries) return;
    Scratch memory(static_cast<char*>(p.workspace) + worker * bytes);
    const ForwardScratch<T> scratch(memory, p.head_dim);
    ForwardBlock<T>(p, sequence, b, head, block * kBlockQueries, scratch).run();
  });
}

}  // namespace

int64_t forward_workspace(const ZeroGateParams& p, int threads) {
  return threads * with_storage_type(p.dtype, [&](auto type) { return scratch_bytes<decltype(type)>(p.head_dim); });
}

void forward(const ZeroGateParams& p, const Parallel& parallel) {
  with_storage_type(p.dtype, [&](auto type) {
    forward_typed<decltype(type)>(p, parallel);
    return 0;
  });
}

}  // namespace lak::cpu::LAK_ISA
