// Forward: output = softmax(scale Q K^T) V + gate * softmax(scale Q Kp^T) Vp, and the log-sum-exp of the word branch.
//
// One task is a block of kBlockQueries query rows of one head. For each block of keys it computes S^T = K Q^T, keeps a
// running maximum and sum per query (online softmax, base 2), and adds P V to one accumulator. The prefix comes last: its
// probabilities, scaled by gate * l / l_p (l, l_p: row sums of the word and prefix branch), go into the SAME accumulator,
// so that one division by l ends both softmaxes.
//
// Scratch of a worker: Q^T [head_dim][queries], S^T [keys][queries], accumulator [queries][head_dim], and the key and
// value block in the form that the products want (products.h). At head_dim 64 and 128 the tiles in use together fit the L1/L2 cache.
#include "kernel_table.h"
#include "products.h"

namespace lak::cpu::LAK_ISA {
namespace {

template <class C>
struct ForwardScratch {
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
template <class Products>
class ForwardBlock {
  using T = typename Products::Storage;
  using C = Compute<T>;
  static constexpr int64_t kLane = kLanes<C>;
  static constexpr C kMinusInfinity = -__builtin_huge_val();

 public:
  ForwardBlock(const ZeroGateParams& params, const Sequence& sequence, int64_t b, int64_t head, int64_t first,
               const ForwardScratch<C>& scratch)
      : p(params), seq(sequence), batch(b), head_q(head), head_kv(head / (params.heads_q / params.heads_kv)), q0(first),
        rows(smaller(kBlockQueries, sequence.queries - first)), padded_rows(round_up(rows, kLane)), depth(params.head_dim),
        padded_depth(round_up(params.head_dim, kLane)), scale(static_cast<C>(params.scale)), s(scratch) {}

  void run() {
    Products::load_columns(row_pointer<const T>(p.query, batch, head_q, seq.first_query + q0), p.query.stride_row, rows,
                           padded_rows, depth, scale, s.query_t);
    for (int64_t i = 0; i < padded_rows; ++i) s.maximum[i] = kMinusInfinity, s.sum[i] = 0;
    for (int64_t i = 0; i < rows * padded_depth; ++i) s.accumulator[i] = 0;
    const int64_t end = visible_end(seq, q0 + rows - 1);
    for (int64_t k0 = seq.key_begin; k0 < end; k0 += kBlockKeys) words(k0, smaller(kBlockKeys, end - k0));
    write_logsumexp();
    if (seq.prefix >= 0) prefix();
    write_output();
  }

 private:
  // S^T of n keys.
  void score(const T* keys, int64_t stride, int64_t n, int64_t hidden) {
    Products::dot(Products::dotted_rows(keys, stride, n, depth, s.keys), n, s.query_t, padded_rows, depth, hidden, scale,
                  s.scores);
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
      for (int v = 0; v < VECS; ++v) highest[v] = maximum<C>(load(s.scores + t * kBlockQueries + m + v * kLane), highest[v]);
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
    Products::sum_over_keys(Products::weights_for_keys(s.scores, n, padded_rows),
                            Products::summed_rows(values, stride, n, depth, s.values), n, rows, padded_depth, hidden, rescale,
                            s.accumulator);
  }

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
  const C scale;
  const ForwardScratch<C>& s;
};

template <class C>
int64_t scratch_bytes(int64_t head_dim) {
  Scratch counter(nullptr);
  ForwardScratch<C> scratch(counter, head_dim);
  return counter.used();
}

template <class Products>
void forward_with(const ZeroGateParams& p, const Parallel& parallel) {
  using C = typename Products::C;
  const int64_t blocks = (p.seq_q + kBlockQueries - 1) / kBlockQueries;
  const int64_t bytes = scratch_bytes<C>(p.head_dim);
  run_tasks(parallel, p.batch * p.heads_q * blocks, [&](int64_t task, int64_t worker) {
    // The blocks of one head follow each other, so that its keys and values stay in cache; the last, longest one first.
    const int64_t block = blocks - 1 - task % blocks, head = task / blocks % p.heads_q, b = task / blocks / p.heads_q;
    const Sequence sequence = sequence_of(p, b);
    if (block * kBlockQueries >= sequence.queries) return;
    Scratch memory(static_cast<char*>(p.workspace) + worker * bytes);
    const ForwardScratch<C> scratch(memory, p.head_dim);
    ForwardBlock<Products>(p, sequence, b, head, block * kBlockQueries, scratch).run();
  });
}

}  // namespace

int64_t forward_workspace(const ZeroGateParams& p, int threads) {
  return threads * with_products(p, [&](auto products) { return scratch_bytes<typename decltype(products)::C>(p.head_dim); });
}

void forward(const ZeroGateParams& p, const Parallel& parallel) {
  with_products(p, [&](auto products) {
    forward_with<decltype(products)>(p, parallel);
    return 0;
  });
}

}  // namespace lak::cpu::LAK_ISA
