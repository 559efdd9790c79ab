// Forward: output = softmax(scale Q K^T) V + gate * softmax(scale Q Kp^T) Vp, and the log-sum-exp of the word branch.
//
// One task is a block of kBlockQueries query rows of one head. For each block of keys it computes S^T = K Q^T, keeps a
// running maximum and sum per query (online softmax, base 2), and adds P V to one accumulator. The prefix comes last: its
// probabilities, scaled by gate * l / l_p (l, l_p: row sums of the word and prefix branch), go into the SAME accumulator,
// so that one division by l ends both softmaxes.
//
// Scratch of a worker: Q^T [head_dim][queries], S^T [keys][queries], accumulator [queries][head_dim], and the key and
// value block in the form that the products want (products.h). At head_dim 64 and 128 the tiles in use together fit the L1/L2 cache.
#include "choose_products.h"
#include "kernel_table.h"

namespace lak::cpu::LAK_ISA {
namespace {

// Probabilities are added up so many at a time: the error of their sum, and so of every log-sum-exp, grows with the length of a
// chain of additions.
constexpr int64_t kSumChain = 16;

template <class C>
struct ForwardScratch {
  C *query_t, *scores, *accumulator, *keys, *values, *maximum, *sum, *rescale;

  ForwardScratch(Scratch& memory, int64_t head_dim) {
    const int64_t padded = round_up(head_dim, kLanes<C>);
    query_t = memory.take<C>(head_dim * kBlockQueries);
    scores = memory.take<C>(kBlockKeys * kBlockQueries);
    accumulator = memory.take<C>(kBlockQueries * padded);
    keys = memory.take<C>(kBlockKeys * padded);
    values = memory.take<C>(kBlockKeys * padded);
    maximum = memory.take<C>(kBlockQueries);
    sum = memory.take<C>(kBlockQueries);
    rescale = memory.take<C>(kBlockQueries);
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
  ForwardBlock(const ZeroGateParams& problem, const Sequence& sequence, int64_t b, int64_t head, int64_t first,
               const ForwardScratch<C>& memory)
      : params(problem), seq(sequence), batch(b), head_q(head), head_kv(head / (problem.heads_q / problem.heads_kv)), q0(first),
        rows(smaller(kBlockQueries, sequence.queries - first)), padded_rows(round_up(rows, kLane)), depth(problem.head_dim),
        padded_depth(round_up(problem.head_dim, kLane)), scale(static_cast<C>(problem.scale)), scratch(memory) {}

  void run() {
    Products::load_columns(row_pointer<const T>(params.query, batch, head_q, seq.first_query + q0), params.query.stride_row,
                           rows, padded_rows, depth, scale, scratch.query_t);
    for (int64_t i = 0; i < padded_rows; ++i) scratch.maximum[i] = kMinusInfinity, scratch.sum[i] = 0;
    for (int64_t i = 0; i < rows * padded_depth; ++i) scratch.accumulator[i] = 0;
    const int64_t end = visible_end(seq, q0 + rows - 1);
    for (int64_t k0 = seq.key_begin; k0 < end; k0 += kBlockKeys) words(k0, smaller(kBlockKeys, end - k0));
    write_logsumexp();
    if (seq.prefix >= 0) prefix();
    write_output();
  }

 private:
  // S^T of n keys.
  void score(const T* keys, int64_t stride, int64_t n, int64_t hidden) {
    Products::dot(Products::dotted_rows(keys, stride, n, depth, scratch.keys), n, scratch.query_t, padded_rows, depth, hidden,
                  scale, scratch.scores);
  }

  // S^T for keys [k0, k0 + n) and the online softmax step, then accumulator += P V.
  void words(int64_t k0, int64_t n) {
    const int64_t hidden = k0 - seq.diagonal - q0;
    const bool crosses_diagonal = hidden + n - 1 > 0;
    score(row_pointer<const T>(params.key, batch, head_kv, seq.first_key + k0), params.key.stride_row, n, hidden);
    if (params.mask.type != MaskType::kNone) add_mask(params.mask, batch, head_q, q0, rows, k0, n, scratch.scores);
    if (crosses_diagonal) {
      for (int64_t m = 0; m < padded_rows; m += kLane) {
        const int64_t seen = seen_keys(n, m + kLane, hidden);
        for (int64_t t = larger(0, m - hidden); t < seen; ++t) {  // keys before are seen by every lane
          C* row = scratch.scores + t * kBlockQueries + m;
          store(row, sees<C>(m, t, hidden) ? load(row) : broadcast(kMinusInfinity));
        }
        softmax_step<1>(m, seen);
        for (int64_t t = seen; t < n; ++t) store(scratch.scores + t * kBlockQueries + m, Vec<C>{});
      }
    } else {
      int64_t m = 0;
      for (; m + kTileVecs * kLane <= padded_rows; m += kTileVecs * kLane) softmax_step<kTileVecs>(m, n);
      for (; m < padded_rows; m += kLane) softmax_step<1>(m, n);
    }
    accumulate(row_pointer<const T>(params.value, batch, head_kv, seq.first_key + k0), params.value.stride_row, n,
               scratch.rescale, hidden);
  }

  // Scores of n keys become probabilities relative to the new running maximum; rescale says what became of the old one.
  // The difference comes before the factor log2(e): it is exact near the maximum, whose probability is exactly 1.
  template <int kVecs>
  void softmax_step(int64_t m, int64_t n) {
    const Vec<C> log2e = broadcast(static_cast<C>(kLog2E));
    Vec<C> highest[kVecs], total[kVecs], reference[kVecs];
    for (int v = 0; v < kVecs; ++v) highest[v] = broadcast(kMinusInfinity);
    for (int64_t t = 0; t < n; ++t)
      for (int v = 0; v < kVecs; ++v)
        highest[v] = maximum<C>(load(scratch.scores + t * kBlockQueries + m + v * kLane), highest[v]);
    for (int v = 0; v < kVecs; ++v) {
      highest[v] = maximum<C>(highest[v], load(scratch.maximum + m + v * kLane));
      // A query that has seen nothing yet: any finite reference keeps -inf - reference at -inf.
      reference[v] = highest[v] == broadcast(kMinusInfinity) ? Vec<C>{} : highest[v];
      const Vec<C> rescale = exp2_nonpositive((load(scratch.maximum + m + v * kLane) - reference[v]) * log2e);
      store(scratch.rescale + m + v * kLane, rescale);
      store(scratch.maximum + m + v * kLane, highest[v]);
      total[v] = load(scratch.sum + m + v * kLane) * rescale;
    }
    for (int64_t first = 0; first < n; first += kSumChain) {
      Vec<C> part[kVecs]{};
      for (int64_t t = first; t < smaller(first + kSumChain, n); ++t) {
        for (int v = 0; v < kVecs; ++v) {
          C* at = scratch.scores + t * kBlockQueries + m + v * kLane;
          const Vec<C> probability = exp2_nonpositive((load(at) - reference[v]) * log2e);
          store(at, probability);
          part[v] += probability;
        }
      }
      for (int v = 0; v < kVecs; ++v) total[v] += part[v];
    }
    for (int v = 0; v < kVecs; ++v) store(scratch.sum + m + v * kLane, total[v]);
  }

  // accumulator[m] = rescale[m] * accumulator[m] + sum_t P[t][m] V[t]; query m sees keys up to m - hidden.
  void accumulate(const T* values, int64_t stride, int64_t n, const C* rescale, int64_t hidden) {
    Products::sum_over_keys(Products::weights_for_keys(scratch.scores, n, padded_rows),
                            Products::summed_rows(values, stride, n, depth, scratch.values), n, rows, padded_depth, hidden,
                            rescale, scratch.accumulator);
  }

  // S_p^T for prefix slots [slot, slot + n).
  void prefix_scores(int64_t slot, int64_t n) {
    score(row_pointer<const T>(params.prefix_key, seq.prefix, head_kv, slot), params.prefix_key.stride_row, n, kNothingHidden);
  }

  void prefix() {
    // The word branch's sums stay in scratch.sum; the prefix has its own maximum and sum, found before anything is added.
    alignas(64) C sum[kBlockQueries];
    for (int64_t m = 0; m < padded_rows; ++m) {
      sum[m] = scratch.sum[m] == 0 ? C(1) : scratch.sum[m];  // a row that saw no key: O = gate * O_p
      scratch.maximum[m] = kMinusInfinity, scratch.sum[m] = 0;
    }
    const int64_t slots = params.prefix_length;
    const bool one_tile = slots <= kBlockKeys;
    for (int64_t slot = 0; slot < slots; slot += kBlockKeys) {
      const int64_t n = smaller(kBlockKeys, slots - slot);
      prefix_scores(slot, n);
      for (int64_t m = 0; m < padded_rows; m += kLane) softmax_step<1>(m, n);
    }
    const C gate = gate_of<C>(params, seq.prefix, head_q);
    const Vec<C> log2e = broadcast(static_cast<C>(kLog2E));
    for (int64_t slot = 0; slot < slots; slot += kBlockKeys) {
      const int64_t n = smaller(kBlockKeys, slots - slot);
      if (!one_tile) prefix_scores(slot, n);
      for (int64_t m = 0; m < padded_rows; m += kLane) {
        const Vec<C> factor = broadcast(gate) * load(sum + m) / load(scratch.sum + m);
        const Vec<C> highest = load(scratch.maximum + m);
        for (int64_t t = 0; t < n; ++t) {
          C* at = scratch.scores + t * kBlockQueries + m;
          store(at, (one_tile ? load(at) : exp2_nonpositive((load(at) - highest) * log2e)) * factor);
        }
      }
      accumulate(row_pointer<const T>(params.prefix_value, seq.prefix, head_kv, slot), params.prefix_value.stride_row, n,
                 nullptr, kNothingHidden);
    }
    for (int64_t m = 0; m < padded_rows; ++m) scratch.sum[m] = sum[m];
  }

  void write_logsumexp() {
    if (!params.logsumexp.data) return;
    C* out = row_statistic<C>(params.logsumexp, batch, head_q, seq.first_query + q0);
    for (int64_t m = 0; m < rows; ++m) {
      out[m] = scratch.sum[m] == 0 ? kMinusInfinity
                                   : static_cast<C>(scratch.maximum[m] + __builtin_log(static_cast<double>(scratch.sum[m])));
    }
  }

  void write_output() {
    for (int64_t m = 0; m < rows; ++m) {
      const C factor = scratch.sum[m] == 0 ? C(0) : C(1) / scratch.sum[m];
      narrow_row(scratch.accumulator + m * padded_depth, factor, depth,
                 row_pointer<T>(params.output, batch, head_q, seq.first_query + q0 + m));
    }
  }

  const ZeroGateParams& params;
  const Sequence& seq;
  const int64_t batch, head_q, head_kv, q0, rows, padded_rows, depth, padded_depth;
  const C scale;
  const ForwardScratch<C>& scratch;
};

template <class C>
int64_t scratch_bytes(int64_t head_dim) {
  Scratch counter(nullptr);
  ForwardScratch<C> scratch(counter, head_dim);
  return counter.used();
}

template <class Products>
void forward_with(const ZeroGateParams& params, const Parallel& parallel) {
  using C = typename Products::C;
  const int64_t blocks = (params.seq_q + kBlockQueries - 1) / kBlockQueries;
  const int64_t bytes = scratch_bytes<C>(params.head_dim);
  run_tasks(parallel, params.batch * params.heads_q * blocks, [&](int64_t task, int64_t worker) {
    [[maybe_unused]] const typename Products::Registers registers;
    // The blocks of one head follow each other, so that its keys and values stay in cache; the last, longest one first.
    const int64_t block = blocks - 1 - task % blocks, head = task / blocks % params.heads_q, b = task / blocks / params.heads_q;
    const Sequence sequence = sequence_of(params, b);
    if (block * kBlockQueries >= sequence.queries) return;
    Scratch memory(static_cast<char*>(params.workspace) + worker * bytes);
    const ForwardScratch<C> scratch(memory, params.head_dim);
    ForwardBlock<Products>(params, sequence, b, head, block * kBlockQueries, scratch).run();
  });
}

}  // namespace

int64_t forward_workspace(const ZeroGateParams& params, int threads) {
  return threads *
         with_products(params, [&](auto products) { return scratch_bytes<typename decltype(products)::C>(params.head_dim); });
}

void forward(const ZeroGateParams& params, const Parallel& parallel) {
  with_products(params, [&](auto products) {
    forward_with<decltype(products)>(params, parallel);
    return 0;
  });
}

}  // namespace lak::cpu::LAK_ISA
