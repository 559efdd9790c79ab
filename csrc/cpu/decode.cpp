// Decode: few new queries against a long key/value cache. Bound by memory: every key and value is read once, for all query
// heads of its group and all new queries.
//
// One task is one range of keys of one key/value head. For a tile of keys it computes the scores of all rows (a row is one
// query of one query head), takes one online softmax step per row and adds P V. Its maxima, sums and accumulators are
// combined with those of the other ranges in a fixed order, and the prefix is added once. The ranges depend on the shape
// alone, so results are the same for every number of threads.
#include "kernel_table.h"
#include "scores.h"

namespace lak::cpu::LAK_ISA {
namespace {

constexpr int64_t kTileKeys = 64;
// Rows x keys whose dot products are summed at once: that many accumulators fill a vector when each is summed up.
constexpr int kDotRows = 4;
template <class C>
constexpr int kDotKeys = kLanes<C> >= 8 ? kLanes<C> / kDotRows : 1;

struct Ranges {
  int64_t count, keys, rows, padded_depth;
};

template <class C>
Ranges ranges_of(const ZeroGateParams& p) {
  constexpr int64_t kTasks = 64, kFewestKeys = 256;
  const int64_t heads = larger(1, p.batch * p.heads_kv);
  const int64_t wanted = larger(1, smaller((kTasks + heads - 1) / heads, p.seq_k / kFewestKeys));
  const int64_t keys = larger(kTileKeys, round_up((p.seq_k + wanted - 1) / wanted, kTileKeys));
  return {larger(1, (p.seq_k + keys - 1) / keys), keys, p.heads_q / p.heads_kv * p.seq_q, round_up(p.head_dim, kLanes<C>)};
}

// The state of an online softmax over rows.
template <class C>
struct Partial {
  C *maximum, *sum, *accumulator;  // [rows], [rows], [rows][padded_depth]
  Partial(Scratch& s, const Ranges& r)
      : maximum(s.take<C>(r.rows)), sum(s.take<C>(r.rows)), accumulator(s.take<C>(r.rows * r.padded_depth)) {}
};

template <class C>
struct DecodeScratch {
  Partial<C> prefix;
  C *query, *scores, *tail;
  DecodeScratch(Scratch& s, const Ranges& r)
      : prefix(s, r), query(s.take<C>(r.rows * r.padded_depth)), scores(s.take<C>(kDotRows * kTileKeys)),
        tail(s.take<C>(kTileKeys * r.padded_depth)) {}
};

template <template <class> class Part, class C>
int64_t bytes_of(const Ranges& r) {
  Scratch counter(nullptr);
  Part<C> part(counter, r);
  return counter.used();
}

// sums[i] = horizontal sum of v[i]: each round halves the number of vectors by adding interleaved halves of two.
template <class C>
LAK_INLINE Vec<C> sum_each(Vec<C> (&v)[kLanes<C>]) {
  using I = IntVec<C>;
  constexpr int lanes = kLanes<C>;
#pragma GCC unroll 4
  for (int half = 1; half < lanes; half *= 2) {
    I low{}, high{};
    for (int lane = 0; lane < lanes; ++lane) {
      low[lane] = lane & half ? lane - half + lanes : lane;
      high[lane] = lane & half ? lane + lanes : lane + half;
    }
#pragma GCC unroll 8
    for (int i = 0; i < lanes; i += 2 * half) {
      v[i] = __builtin_shuffle(v[i], v[i + half], low) + __builtin_shuffle(v[i], v[i + half], high);
    }
  }
  return v[0];
}

// Rows of one key/value head of one sequence.
template <class T>
class DecodeRows {
  using C = Compute<T>;
  static constexpr int64_t kLane = kLanes<C>;
  static constexpr C kMinusInfinity = -__builtin_huge_val();

 public:
  DecodeRows(const ZeroGateParams& params, const Ranges& r, const DecodeScratch<C>& scratch, int64_t b, int64_t kv_head)
      : p(params), s(scratch), seq(sequence_of(params, b)), batch(b), head_kv(kv_head), group(p.heads_q / p.heads_kv),
        rows(r.rows), depth(p.head_dim), padded_depth(r.padded_depth) {
    for (int64_t r_ = 0; r_ < rows; ++r_) {
      const T* from = row_pointer<const T>(p.query, batch, head_of(r_), query_of(r_));
      C* to = s.query + r_ * padded_depth;
      widen_row(from, depth, padded_depth, to);
      for (int64_t d = 0; d < padded_depth; ++d) to[d] *= static_cast<C>(p.scale);
    }
  }

  void keys(int64_t begin, int64_t end, const Partial<C>& state) {
    clear(state);
    begin = larger(begin, seq.key_begin);
    end = smaller(end, visible_end(seq, seq.queries - 1));
    if (begin < end) {
      attend(p.key, p.value, batch, begin, end, state,
             [&](int64_t row) { return smaller(end, query_of(row) + seq.diagonal + 1); });
    }
  }

  // Combines the states of all ranges, adds the prefix and writes the output rows.
  void finish(const char* states, const Ranges& r, int64_t state_bytes) {
    if (seq.prefix >= 0) {
      clear(s.prefix);
      attend(p.prefix_key, p.prefix_value, seq.prefix, 0, p.prefix_length, s.prefix,
             [&](int64_t) { return p.prefix_length; });
    }
    for (int64_t row = 0; row < rows; ++row) {
      C highest = kMinusInfinity, sum = 0;
      C* out = s.query + row * padded_depth;  // the scaled queries are not needed any more
      for (int64_t d = 0; d < padded_depth; ++d) out[d] = 0;
      for (int64_t i = 0; i < r.count; ++i) highest = larger_of(highest, state(states, r, state_bytes, i).maximum[row]);
      for (int64_t i = 0; i < r.count && highest > kMinusInfinity; ++i) {
        const Partial<C> part = state(states, r, state_bytes, i);
        const C factor = exp2_nonpositive(broadcast((part.maximum[row] - highest) * static_cast<C>(kLog2E)))[0];
        sum += factor * part.sum[row];
        add_scaled(part.accumulator + row * padded_depth, factor, out);
      }
      const C inverse = sum > 0 ? C(1) / sum : sum == 0 ? C(0) : sum;  // NaN stays NaN
      for (int64_t d = 0; d < padded_depth; ++d) out[d] *= inverse;
      if (seq.prefix >= 0) {
        const C gate = gate_of<C>(p, seq.prefix, head_of(row));
        add_scaled(s.prefix.accumulator + row * padded_depth, gate / s.prefix.sum[row], out);
      }
      narrow_row(out, C(1), depth, row_pointer<T>(p.output, batch, head_of(row), query_of(row)));
    }
  }

 private:
  int64_t head_of(int64_t row) const { return head_kv * group + row / p.seq_q; }
  int64_t query_of(int64_t row) const { return row % p.seq_q; }
  static C larger_of(C a, C b) { return a > b ? a : b; }
  static Partial<C> state(const char* states, const Ranges& r, int64_t bytes, int64_t i) {
    Scratch memory(const_cast<char*>(states) + i * bytes);
    return Partial<C>(memory, r);
  }

  void add_scaled(const C* from, C factor, C* to) const {
    for (int64_t d = 0; d < padded_depth; d += kLane) store(to + d, load(to + d) + broadcast(factor) * load(from + d));
  }

  void clear(const Partial<C>& state) const {
    for (int64_t row = 0; row < rows; ++row) state.maximum[row] = kMinusInfinity, state.sum[row] = 0;
    for (int64_t i = 0; i < rows * padded_depth; ++i) state.accumulator[i] = 0;
  }

  // Online softmax of all rows over keys [begin, end); row r sees those below limit(r).
  template <class Limit>
  void attend(const TensorView& k_view, const TensorView& v_view, int64_t b, int64_t begin, int64_t end,
              const Partial<C>& state, const Limit& limit) {
    for (int64_t k0 = begin; k0 < end; k0 += kTileKeys) {
      const int64_t n = smaller(kTileKeys, end - k0);
      const T* k = row_pointer<const T>(k_view, b, head_kv, (&k_view == &p.key ? seq.first_key : 0) + k0);
      const T* v = row_pointer<const T>(v_view, b, head_kv, (&v_view == &p.value ? seq.first_key : 0) + k0);
      for (int64_t row = 0; row < rows; row += kDotRows) {
        const int64_t count = smaller(kDotRows, rows - row);
        if (depth == padded_depth) {
          dot_products(k, k_view.stride_row, n, row, count);
        } else {
          for (int64_t t = 0; t < n; ++t) widen_row(k + t * k_view.stride_row, depth, padded_depth, s.tail + t * padded_depth);
          dot_products(static_cast<const C*>(s.tail), padded_depth, n, row, count);
        }
        C rescale[kDotRows];
        for (int64_t r = 0; r < count; ++r) {
          rescale[r] = softmax_row(s.scores + r * kTileKeys, larger(0, smaller(n, limit(row + r) - k0)), n,
                                   state.maximum[row + r], state.sum[row + r]);
        }
        C* out = state.accumulator + row * padded_depth;
        if (depth == padded_depth) {
          weighted_sum(v, v_view.stride_row, n, count, rescale, out);
        } else {
          for (int64_t t = 0; t < n; ++t) widen_row(v + t * v_view.stride_row, depth, padded_depth, s.tail + t * padded_depth);
          weighted_sum(static_cast<const C*>(s.tail), padded_depth, n, count, rescale, out);
        }
      }
    }
  }

  // scores[r][t] = Q[row + r] . K[t]
  template <class S>
  void dot_products(const S* k, int64_t stride, int64_t n, int64_t row, int64_t count) {
    if (count == kDotRows && kDotKeys<C> > 1) return dot_products_of<kDotRows, kDotKeys<C>>(k, stride, n, row, count);
    dot_products_of<1, 1>(k, stride, n, row, count);
  }

  template <int ROWS, int KEYS, class S>
  void dot_products_of(const S* k, int64_t stride, int64_t n, int64_t row, int64_t count) {
    for (int64_t r0 = 0; r0 < count; r0 += ROWS) {
      const C* q = s.query + (row + r0) * padded_depth;
      int64_t t = 0;
      if constexpr (ROWS * KEYS == kLanes<C>) {
        for (; t + KEYS <= n; t += KEYS) {
          Vec<C> sum[ROWS * KEYS]{};  // [row][key]
          for (int64_t d = 0; d < padded_depth; d += kLane) {
            Vec<C> key[KEYS];
            for (int i = 0; i < KEYS; ++i) key[i] = load_wide(k + (t + i) * stride + d);
            for (int r = 0; r < ROWS; ++r) {
              const Vec<C> x = load(q + r * padded_depth + d);
              for (int i = 0; i < KEYS; ++i) sum[r * KEYS + i] += x * key[i];
            }
          }
          const Vec<C> each = sum_each<C>(sum);
          for (int r = 0; r < ROWS; ++r)
            for (int i = 0; i < KEYS; ++i) s.scores[(r0 + r) * kTileKeys + t + i] = each[r * KEYS + i];
        }
      }
      for (; t < n; ++t) {
        for (int r = 0; r < ROWS; ++r) {
          Vec<C> sum{};
          for (int64_t d = 0; d < padded_depth; d += kLane) sum += load(q + r * padded_depth + d) * load_wide(k + t * stride + d);
          s.scores[(r0 + r) * kTileKeys + t] = horizontal_sum<C>(sum);
        }
      }
    }
  }

  // Probabilities of one row against its new maximum; keys from `seen` on get 0. Returns what the old sums shrink by.
  static C softmax_row(C* scores, int64_t seen, int64_t n, C& maximum_so_far, C& sum_so_far) {
    for (int64_t t = seen; t < kTileKeys; ++t) scores[t] = kMinusInfinity;
    Vec<C> highest = broadcast(kMinusInfinity);
    for (int64_t t = 0; t < n; t += kLane) highest = maximum<C>(load(scores + t), highest);
    C top = kMinusInfinity;
    for (int i = 0; i < kLane; ++i) top = highest[i] > top || highest[i] != highest[i] ? highest[i] : top;
    top = larger_of(top, maximum_so_far);
    const C reference = top == kMinusInfinity ? C(0) : top;
    Vec<C> sum{};
    for (int64_t t = 0; t < n; t += kLane) {
      const Vec<C> probability =
          exp2_nonpositive((load(scores + t) - broadcast(reference)) * broadcast(static_cast<C>(kLog2E)));
      store(scores + t, probability);
      sum += probability;
    }
    const C rescale = exp2_nonpositive(broadcast((maximum_so_far - reference) * static_cast<C>(kLog2E)))[0];
    maximum_so_far = top;
    sum_so_far = sum_so_far * rescale + horizontal_sum<C>(sum);
    return rescale;
  }

  // out[r] = rescale[r] * out[r] + sum_t scores[r][t] V[t]
  template <class S>
  void weighted_sum(const S* v, int64_t stride, int64_t n, int64_t count, const C* rescale, C* out) {
    constexpr int64_t vecs = kTileVecs;
    int64_t d = 0;
    for (; d + vecs * kLane <= padded_depth; d += vecs * kLane) {
      if (count == kDotRows) {
        weighted_sum_of<kDotRows, vecs>(v + d, stride, n, rescale, out + d);
      } else {
        for (int64_t r = 0; r < count; ++r) weighted_sum_of<1, vecs>(v + d, stride, n, rescale + r, out + r * padded_depth + d, r);
      }
    }
    for (; d < padded_depth; d += kLane) {
      for (int64_t r = 0; r < count; ++r) weighted_sum_of<1, 1>(v + d, stride, n, rescale + r, out + r * padded_depth + d, r);
    }
  }

  template <int ROWS, int VECS, class S>
  void weighted_sum_of(const S* v, int64_t stride, int64_t n, const C* rescale, C* out, int64_t first = 0) {
    Vec<C> sum[ROWS][VECS];
    for (int r = 0; r < ROWS; ++r)
      for (int i = 0; i < VECS; ++i) sum[r][i] = load(out + r * padded_depth + i * kLane) * broadcast(rescale[r]);
    const C* weights = s.scores + first * kTileKeys;
    for (int64_t t = 0; t < n; ++t) {
      Vec<C> value[VECS];
      for (int i = 0; i < VECS; ++i) value[i] = load_wide(v + t * stride + i * kLane);
      for (int r = 0; r < ROWS; ++r) {
        const Vec<C> x = broadcast(weights[r * kTileKeys + t]);
        for (int i = 0; i < VECS; ++i) sum[r][i] += x * value[i];
      }
    }
    for (int r = 0; r < ROWS; ++r)
      for (int i = 0; i < VECS; ++i) store(out + r * padded_depth + i * kLane, sum[r][i]);
  }

  const ZeroGateParams& p;
  const DecodeScratch<C>& s;
  const Sequence seq;
  const int64_t batch, head_kv, group, rows, depth, padded_depth;
};

template <class T>
void decode_typed(const ZeroGateParams& p, const Parallel& parallel) {
  using C = Compute<T>;
  const Ranges ranges = ranges_of<C>(p);
  const int64_t state_bytes = bytes_of<Partial, C>(ranges), scratch_bytes = bytes_of<DecodeScratch, C>(ranges);
  const int64_t heads = p.batch * p.heads_kv;
  char* states = static_cast<char*>(p.workspace);
  char* workers = states + heads * ranges.count * state_bytes;
  run_tasks(parallel, heads * ranges.count, [&](int64_t task, int64_t worker) {
    Scratch memory(workers + worker * scratch_bytes), own(states + task * state_bytes);
    const DecodeScratch<C> scratch(memory, ranges);
    const int64_t range = task % ranges.count, head = task / ranges.count;
    DecodeRows<T>(p, ranges, scratch, head / p.heads_kv, head % p.heads_kv)
        .keys(range * ranges.keys, (range + 1) * ranges.keys, Partial<C>(own, ranges));
  });
  run_tasks(parallel, heads, [&](int64_t head, int64_t worker) {
    Scratch memory(workers + worker * scratch_bytes);
    const DecodeScratch<C> scratch(memory, ranges);
    DecodeRows<T>(p, ranges, scratch, head / p.heads_kv, head % p.heads_kv)
        .finish(states + head * ranges.count * state_bytes, ranges, state_bytes);
  });
}

}  // namespace

int64_t decode_workspace(const ZeroGateParams& p, int threads) {
  return with_storage_type(p.dtype, [&](auto type) {
    using C = Compute<decltype(type)>;
    const Ranges r = ranges_of<C>(p);
    return p.batch * p.heads_kv * r.count * bytes_of<Partial, C>(r) + threads * bytes_of<DecodeScratch, C>(r);
  });
}

void decode(const ZeroGateParams& p, const Parallel& parallel) {
  with_storage_type(p.dtype, [&](auto type) {
    decode_typed<decltype(type)>(p, parallel);
    return 0;
  });
}

}  // namespace lak::cpu::LAK_ISA
