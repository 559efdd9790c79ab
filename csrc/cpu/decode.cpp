// Decode: few new queries against a long key/value cache. Bound by memory: every key and value is read once, for all
// query heads of its group and all new queries.
//
// One task is one range of keys of one key/value head. For a tile of keys it computes the scores of all rows (a row is
// one query of one query head), takes one online softmax step per row and adds P V. While a tile's keys are multiplied
// its values are prefetched, and while its values are added up the next tile's keys. Whoever finishes the last range of
// a head combines all of them in their order and adds the prefix. Ranges depend on a sequence's own keys and on the
// number of rows: results are the same for every number of threads, and beside any other sequence.
#include "kernel_table.h"
#include "scores.h"

namespace lak::cpu::LAK_ISA {
namespace {

// Keys of a tile: as many as fill 16 KiB, so that they and their values lie in L1 together.
constexpr int64_t kTileBytes = 16 << 10, kFewestTileKeys = 32, kTileKeys = 256;  // the last: the most
constexpr int64_t kCacheLine = 64;
// Rows that share one read of a tile, in dot products with kLanes / rows keys: as many sums as a vector has lanes, so
// that one tree of shuffles ends them all.
constexpr int kChunk = 4;

// How the keys that a sequence sees are cut into ranges.
struct Ranges {
  int64_t begin, end, keys, count;  // range i: keys [begin + i * keys, end of that or `end`)

  static constexpr int64_t kMost = 32;         // enough for many threads on one head; the combination stays cheap
  static constexpr int64_t kFewestKeys = 512;  // of a range: a task of some 50 us

  static int64_t fewest_keys(int64_t rows) { return larger(kFewestKeys, 32 * rows); }  // states: a fraction of the keys
  static int64_t most(int64_t seq_k, int64_t rows) {
    return larger(1, smaller(kMost, (seq_k + fewest_keys(rows) - 1) / fewest_keys(rows)));
  }

  Ranges(const Sequence& seq, int64_t rows) : begin(seq.key_begin), end(visible_end(seq, seq.queries - 1)) {
    const int64_t seen = larger(0, end - begin);
    keys = larger(fewest_keys(rows), round_up((seen + kMost - 1) / kMost, 256));
    count = larger(1, (seen + keys - 1) / keys);
  }
};

// Sizes every task shares.
struct Sizes {
  int64_t rows, padded_depth, most_ranges;
};

template <class C>
Sizes sizes_of(const ZeroGateParams& p) {
  const int64_t rows = p.heads_kv > 0 ? p.heads_q / p.heads_kv * p.seq_q : 0;
  return {rows, round_up(p.head_dim, kLanes<C>), Ranges::most(p.seq_k, rows)};
}

// The state of an online softmax over rows.
template <class C>
struct Partial {
  C *maximum, *sum, *accumulator;  // [rows], [rows], [rows][padded_depth]
  Partial(Scratch& s, const Sizes& z)
      : maximum(s.take<C>(z.rows)), sum(s.take<C>(z.rows)), accumulator(s.take<C>(z.rows * z.padded_depth)) {}
};

template <class C>
struct DecodeScratch {
  Partial<C> prefix;
  C* query;                  // [rows, padded to whole chunks with zeros][padded_depth], scaled
  C* scores;                 // [kChunk][kTileKeys]
  C *key_tail, *value_tail;  // [kTileKeys][kLanes]: what of head_dim does not fill a vector, padded with zeros
  DecodeScratch(Scratch& s, const Sizes& z)
      : prefix(s, z), query(s.take<C>(round_up(z.rows, kChunk) * z.padded_depth)),
        scores(s.take<C>(kChunk * kTileKeys)), key_tail(s.take<C>(kTileKeys * kLanes<C>)),
        value_tail(s.take<C>(kTileKeys * kLanes<C>)) {}
};

template <template <class> class Part, class C>
int64_t bytes_of(const Sizes& z) {
  Scratch counter(nullptr);
  Part<C> part(counter, z);
  return counter.used();
}

// Lane i: the horizontal sum of v[i]. Each round halves the number of vectors by adding interleaved halves of two.
template <class C, int HALF = 1>
LAK_INLINE Vec<C> sum_each(Vec<C> (&v)[kLanes<C>]) {
  constexpr int lanes = kLanes<C>;
  if constexpr (HALF == lanes) {
    return v[0];
  } else {
    IntVec<C> low{}, high{};
    for (int lane = 0; lane < lanes; ++lane) {  // lane >= lanes selects from the second operand
      low[lane] = lane & HALF ? lane - HALF + lanes : lane;
      high[lane] = lane & HALF ? lane + lanes : lane + HALF;
    }
    unrolled<lanes / (2 * HALF)>([&](auto pair) LAK_INLINE_LAMBDA {
      constexpr int i = 2 * HALF * pair;
      v[i] = __builtin_shuffle(v[i], v[i + HALF], low) + __builtin_shuffle(v[i], v[i + HALF], high);
    });
    return sum_each<C, 2 * HALF>(v);
  }
}

template <class C, class Combine>
LAK_INLINE C reduce(Vec<C> v, const Combine& combine) {
#pragma GCC unroll 4
  for (int half = kLanes<C> / 2; half > 0; half /= 2) {
    IntVec<C> other{};
    for (int lane = 0; lane < kLanes<C>; ++lane) other[lane] = lane ^ half;
    v = combine(v, __builtin_shuffle(v, other));
  }
  return v[0];
}

// Rows that will be read next. Several passes over a tile each prefetch a share of them, so that memory is busy from the
// first pass to the last.
struct Ahead {
  const char* data = nullptr;
  int64_t stride = 0, rows = 0, bytes = 0;  // bytes from row to row, and of a row
  int64_t due = 0, every = 1;               // the next row of this share, and the distance to the one after

  Ahead share(int64_t index, int64_t shares) const {
    return {data, stride, rows, bytes, due + index * every, every * shares};
  }

  // Called for one row of the present tile after the other.
  LAK_INLINE void prefetch(int64_t row) {
    if (row != due || row >= rows) return;
    due += every;
    const char* line = data + row * stride;
    for (int64_t i = 0; i < bytes; i += kCacheLine) __builtin_prefetch(line + i);
  }
};

// Rows of storage, and beside them the part of each that does not fill a vector (nullptr: there is none).
template <class T>
struct TileRows {
  const T* data;
  int64_t stride;
  const Compute<T>* tail;
  int64_t count;
};

// All rows of one key/value head of one sequence.
template <class T>
class DecodeRows {
  using C = Compute<T>;
  static constexpr int64_t kLane = kLanes<C>;
  static constexpr C kMinusInfinity = -__builtin_huge_val();

 public:
  DecodeRows(const ZeroGateParams& params, const Sizes& z, const Sequence& sequence, int64_t b, int64_t kv_head,
             const DecodeScratch<C>& scratch)
      : p(params), seq(sequence), s(scratch), batch(b), head_kv(kv_head), group(p.heads_q / p.heads_kv), rows(z.rows),
        depth(p.head_dim), padded_depth(z.padded_depth), whole(depth / kLane * kLane),
        tile_keys(larger(kFewestTileKeys, smaller(kTileKeys, kTileBytes / row_bytes(depth) / 32 * 32))) {
    for (int64_t row = 0; row < rows; ++row) {
      C* to = s.query + row * padded_depth;
      widen_row(row_pointer<const T>(p.query, batch, head_of(row), query_of(row)), depth, padded_depth, to);
      for (int64_t d = 0; d < padded_depth; ++d) to[d] *= static_cast<C>(p.scale);
    }
    for (int64_t i = rows * padded_depth; i < round_up(rows, kChunk) * padded_depth; ++i) s.query[i] = 0;
  }

  void words(int64_t begin, int64_t end, const Partial<C>& state) {
    attend(p.key, p.value, batch, begin, end, state, [&](int64_t row) { return query_of(row) + seq.diagonal + 1; });
  }

  // Combines `count` states that lie `state_bytes` apart, adds the prefix and writes the output rows.
  void finish(const char* states, const Sizes& z, int64_t state_bytes, int64_t count) {
    if (seq.prefix >= 0) {
      const int64_t slots = p.prefix_length;
      attend(p.prefix_key, p.prefix_value, seq.prefix, 0, slots, s.prefix, [&](int64_t) { return slots; });
    }
    const auto state = [&](int64_t i) {
      Scratch memory(const_cast<char*>(states) + i * state_bytes);
      return Partial<C>(memory, z);
    };
    for (int64_t row = 0; row < rows; ++row) {
      C highest = kMinusInfinity, sum = 0;
      for (int64_t i = 0; i < count; ++i) highest = larger_of(state(i).maximum[row], highest);
      const C reference = highest == kMinusInfinity ? C(0) : highest;
      C* out = s.query + row * padded_depth;  // the scaled queries are not needed any more
      for (int64_t d = 0; d < padded_depth; ++d) out[d] = 0;
      for (int64_t i = 0; i < count; ++i) {
        const Partial<C> part = state(i);
        const C factor = shrinking(part.maximum[row], reference);
        sum += factor * part.sum[row];
        add_scaled(part.accumulator + row * padded_depth, factor, out);
      }
      const C inverse = sum == 0 ? C(0) : C(1) / sum;  // 0: the row sees no key; NaN stays NaN
      for (int64_t d = 0; d < padded_depth; ++d) out[d] *= inverse;
      if (seq.prefix >= 0) {
        const C gate = gate_of<C>(p, seq.prefix, head_of(row));
        add_scaled(s.prefix.accumulator + row * padded_depth, gate / s.prefix.sum[row], out);
      }
      narrow_row(out, C(1), depth, row_pointer<T>(p.output, batch, head_of(row), query_of(row)));
      if (p.logsumexp.data) {
        *row_statistic<C>(p.logsumexp, batch, head_of(row), query_of(row)) =
            sum == 0 ? kMinusInfinity : static_cast<C>(highest + __builtin_log(static_cast<double>(sum)));
      }
    }
  }

 private:
  int64_t head_of(int64_t row) const { return head_kv * group + row / p.seq_q; }
  int64_t query_of(int64_t row) const { return row % p.seq_q; }
  static int64_t row_bytes(int64_t depth) { return larger(1, depth * static_cast<int64_t>(sizeof(T))); }
  static C larger_of(C a, C b) { return a > b ? a : b; }
  // What a sum relative to `maximum_then` shrinks by when it becomes relative to `reference`.
  static C shrinking(C maximum_then, C reference) {
    return exp2_nonpositive(broadcast((maximum_then - reference) * static_cast<C>(kLog2E)))[0];
  }

  void add_scaled(const C* from, C factor, C* to) const {
    for (int64_t d = 0; d < padded_depth; d += kLane) store(to + d, load(to + d) + broadcast(factor) * load(from + d));
  }

  TileRows<T> tile_of(const TensorView& view, int64_t b, int64_t first, int64_t n, C* tail) const {
    const T* data = row_pointer<const T>(view, b, head_kv, first);
    if (whole == depth) return {data, view.stride_row, nullptr, n};
    for (int64_t t = 0; t < n; ++t) {
      widen_row(data + t * view.stride_row + whole, depth - whole, kLane, tail + t * kLane);
    }
    return {data, view.stride_row, tail, n};
  }
  Ahead ahead(const TensorView& view, int64_t b, int64_t first, int64_t n) const {
    constexpr int64_t size = sizeof(T);
    const T* data = row_pointer<const T>(view, b, head_kv, first);
    return {reinterpret_cast<const char*>(data), view.stride_row * size, n, depth * size};
  }

  // Online softmax of all rows over keys [begin, end); a row sees those below limit(row).
  template <class Limit>
  void attend(const TensorView& k_view, const TensorView& v_view, int64_t b, int64_t begin, int64_t end,
              const Partial<C>& state, const Limit& limit) {
    for (int64_t row = 0; row < rows; ++row) state.maximum[row] = kMinusInfinity, state.sum[row] = 0;
    for (int64_t i = 0; i < rows * padded_depth; ++i) state.accumulator[i] = 0;
    Ahead first_keys = ahead(k_view, b, begin, smaller(tile_keys, end - begin));  // nobody has asked for these yet
    for (int64_t t = 0; t < first_keys.rows; ++t) first_keys.prefetch(t);
    for (int64_t k0 = begin; k0 < end; k0 += tile_keys) {
      const int64_t n = smaller(tile_keys, end - k0);
      Ahead values_ahead = ahead(v_view, b, k0, n);
      Ahead keys_ahead = ahead(k_view, b, k0 + n, larger(0, smaller(tile_keys, end - k0 - n)));
      const TileRows<T> k = tile_of(k_view, b, k0, n, s.key_tail);
      for (int64_t row = 0; row < rows; row += kChunk) {
        const int64_t count = smaller(kChunk, rows - row);
        dot_products(k, row, count, values_ahead);
        C rescale[kChunk];
        for (int64_t r = 0; r < count; ++r) {
          rescale[r] = softmax_row(s.scores + r * kTileKeys, larger(0, smaller(n, limit(row + r) - k0)), n,
                                   state.maximum[row + r], state.sum[row + r]);
        }
        if (row == 0 && whole != depth) tile_of(v_view, b, k0, n, s.value_tail);
        const TileRows<T> v{row_pointer<const T>(v_view, b, head_kv, k0), v_view.stride_row,
                            whole == depth ? nullptr : s.value_tail, n};
        const int64_t chunks = (rows + kChunk - 1) / kChunk;
        weighted_sum(v, count, rescale, state.accumulator + row * padded_depth, keys_ahead.share(row / kChunk, chunks));
        values_ahead.rows = 0;  // the first chunk's sums read them all
      }
    }
  }

  // scores[r][t] = Q[row + r] . K[t]; beyond the last key a multiple of kLanes is filled with anything.
  void dot_products(const TileRows<T>& k, int64_t row, int64_t count, const Ahead& next) {
    constexpr int widest = kLane < kChunk ? kLane : kChunk;
    const C* query = s.query + row * padded_depth;
    for (int64_t r = 0; r < count; r += widest) {
      const int64_t left = count - r;
      const auto of = left == 1   ? dot_function<1>(k.tail)
                      : left == 2 ? dot_function<2>(k.tail)
                                  : dot_function<widest>(k.tail);
      (this->*of)(k, query + r * padded_depth, s.scores + r * kTileKeys, next);
    }
  }

  template <int ROWS>
  static auto dot_function(const C* tail) {
    return tail ? &DecodeRows::dot_products_of<ROWS, true> : &DecodeRows::dot_products_of<ROWS, false>;
  }

  // TAIL is a template argument so that the sums live in registers from end to end.
  template <int ROWS, bool TAIL>
  __attribute__((noinline)) void dot_products_of(const TileRows<T>& k, const C* query, C* scores, Ahead next) {
    constexpr int keys = kLanes<C> / ROWS;
    for (int64_t t = 0; t < k.count; t += keys) {
      const T* key[keys];
      unrolled<keys>([&](auto i) LAK_INLINE_LAMBDA {
        key[i] = k.data + smaller(t + i, k.count - 1) * k.stride;
        next.prefetch(t + i);
      });
      Vec<C> sum[ROWS * keys];  // [row][key]
      unrolled<ROWS * keys>([&](auto i) LAK_INLINE_LAMBDA { sum[i] = Vec<C>{}; });
      const auto add = [&](int64_t d, const auto& element) LAK_INLINE_LAMBDA {
        Vec<C> x[keys];
        unrolled<keys>([&](auto i) LAK_INLINE_LAMBDA { x[i] = element(i); });
        unrolled<ROWS>([&](auto r) LAK_INLINE_LAMBDA {
          const Vec<C> q = in_register<C>(load(query + r * padded_depth + d));
          unrolled<keys>([&](auto i) LAK_INLINE_LAMBDA { sum[r * keys + i] += q * x[i]; });
        });
      };
      for (int64_t d = 0; d < whole; d += kLane) {
        add(d, [&](auto i) LAK_INLINE_LAMBDA { return load_wide(key[i] + d); });
      }
      if constexpr (TAIL) {
        const C* tail = k.tail;
        const int64_t last = k.count - 1;
        add(whole, [&](auto i) LAK_INLINE_LAMBDA { return load(tail + smaller(t + i, last) * kLane); });
      }
      alignas(kVectorBytes) C each[kLane];
      store(each, sum_each<C>(sum));
      for (int r = 0; r < ROWS; ++r) __builtin_memcpy(scores + r * kTileKeys + t, each + r * keys, keys * sizeof(C));
    }
  }

  // Probabilities of one row against its new maximum; keys from `seen` on get 0. Returns what the old sums shrink by.
  static C softmax_row(C* scores, int64_t seen, int64_t n, C& maximum_so_far, C& sum_so_far) {
    for (int64_t t = seen; t < round_up(n, kLane); ++t) scores[t] = kMinusInfinity;
    Vec<C> highest = broadcast(maximum_so_far);
    for (int64_t t = 0; t < n; t += kLane) highest = maximum<C>(load(scores + t), highest);  // NaN: second operand
    const C top = reduce<C>(highest, [](Vec<C> a, Vec<C> b) { return maximum<C>(a, b); });
    const C reference = top == kMinusInfinity ? C(0) : top;
    Vec<C> sum{};
    for (int64_t t = 0; t < n; t += kLane) {
      const Vec<C> probability =
          exp2_nonpositive((load(scores + t) - broadcast(reference)) * broadcast(static_cast<C>(kLog2E)));
      store(scores + t, probability);
      sum += probability;
    }
    const C rescale = shrinking(maximum_so_far, reference);
    maximum_so_far = top;
    sum_so_far = sum_so_far * rescale + reduce<C>(sum, [](Vec<C> a, Vec<C> b) { return a + b; });
    return rescale;
  }

  // out[r] = rescale[r] * out[r] + sum_t scores[r][t] V[t]
  void weighted_sum(const TileRows<T>& v, int64_t count, const C* rescale, C* out, const Ahead& next) {
    switch (count) {
      case 1: return weighted_sum_of<1>(v, rescale, out, next);
      case 2: return weighted_sum_of<2>(v, rescale, out, next);
      case 3: return weighted_sum_of<3>(v, rescale, out, next);
      default: return weighted_sum_of<kChunk>(v, rescale, out, next);
    }
  }

  template <int ROWS>
  void weighted_sum_of(const TileRows<T>& v, const C* rescale, C* out, const Ahead& next) {
    // As many sums as leave registers for the values and a broadcast, of 32 (AVX-512) or 16.
    constexpr int vecs = kVectorBytes == 64 ? (ROWS > 2 ? 4 : 8) : (ROWS > 2 ? 3 : 4);
    const int64_t d = columns<ROWS, vecs>(v, 0, rescale, out, next);
    if (v.tail) block<ROWS, 1>(v.tail, kLane, v.count, rescale, out + d, Ahead{});
  }

  template <int ROWS, int VECS>
  int64_t columns(const TileRows<T>& v, int64_t d, const C* rescale, C* out, const Ahead& next) {
    constexpr int64_t width = VECS * kLane;
    for (; d + width <= whole; d += width) {
      block<ROWS, VECS>(v.data + d, v.stride, v.count, rescale, out + d, next.share(d / width, whole / width));
    }
    if constexpr (VECS > 1) return columns<ROWS, (VECS + 1) / 2>(v, d, rescale, out, d == 0 ? next : Ahead{});
    else return d;
  }

  // Sums begin at zero and meet the old ones at the end: short chains of additions round less.
  template <int ROWS, int VECS, class S>
  __attribute__((noinline)) void block(const S* v, int64_t stride, int64_t n, const C* rescale, C* out, Ahead next) {
    Vec<C> sum[ROWS * VECS];
    unrolled<ROWS * VECS>([&](auto i) LAK_INLINE_LAMBDA { sum[i] = Vec<C>{}; });
    const C* weights = s.scores;
    for (int64_t t = 0; t < n; ++t) {
      next.prefetch(t);
      Vec<C> value[VECS];
      unrolled<VECS>([&](auto i) LAK_INLINE_LAMBDA { value[i] = load_wide(v + t * stride + i * kLane); });
      unrolled<ROWS>([&](auto r) LAK_INLINE_LAMBDA {
        const Vec<C> x = broadcast(weights[r * kTileKeys + t]);
        unrolled<VECS>([&](auto i) LAK_INLINE_LAMBDA { sum[r * VECS + i] += x * value[i]; });
      });
    }
    unrolled<ROWS * VECS>([&](auto i) LAK_INLINE_LAMBDA {
      C* to = out + i / VECS * padded_depth + i % VECS * kLane;
      store(to, load(to) * broadcast(rescale[i / VECS]) + sum[i]);
    });
  }

  const ZeroGateParams& p;
  const Sequence& seq;
  const DecodeScratch<C>& s;
  const int64_t batch, head_kv, group, rows, depth, padded_depth;
  const int64_t whole;  // the part of head_dim that fills vectors
  const int64_t tile_keys;
};

// Workspace: how many ranges of each head are done, the ranges' states, a scratch per worker.
template <class C>
struct Workspace {
  int64_t counters, state_bytes, scratch_bytes, states, workers;

  Workspace(const ZeroGateParams& p, const Sizes& z)
      : counters(round_up(p.batch * p.heads_kv * static_cast<int64_t>(sizeof(int64_t)), 64)),
        state_bytes(bytes_of<Partial, C>(z)), scratch_bytes(bytes_of<DecodeScratch, C>(z)), states(counters),
        workers(states + p.batch * p.heads_kv * z.most_ranges * state_bytes) {}
};

template <class T>
void decode_typed(const ZeroGateParams& p, const Parallel& parallel) {
  using C = Compute<T>;
  const Sizes z = sizes_of<C>(p);
  const Workspace<C> layout(p, z);
  const int64_t heads = p.batch * p.heads_kv, tasks = heads * z.most_ranges;
  if (tasks == 0) return;
  char* memory = static_cast<char*>(p.workspace);
  int64_t* done = reinterpret_cast<int64_t*>(memory);
  for (int64_t i = 0; i < heads; ++i) done[i] = 0;
  // Ranges of keys follow each other in memory; where heads lie side by side (a [batch, keys, heads, head_dim] cache),
  // the same range of all heads does, and shares its pages.
  const bool heads_side_by_side = p.key.stride_head < p.key.stride_row;
  run_tasks(parallel, tasks, [&](int64_t task, int64_t worker) {
    const int64_t b = task / (p.heads_kv * z.most_ranges), rest = task % (p.heads_kv * z.most_ranges);
    const int64_t range = heads_side_by_side ? rest / p.heads_kv : rest % z.most_ranges;
    const int64_t head = heads_side_by_side ? rest % p.heads_kv : rest / z.most_ranges;
    const Sequence seq = sequence_of(p, b);
    const Ranges ranges(seq, z.rows);
    if (range >= ranges.count) return;
    Scratch own(memory + layout.workers + worker * layout.scratch_bytes);
    const DecodeScratch<C> scratch(own, z);
    char* states = memory + layout.states + (b * p.heads_kv + head) * z.most_ranges * layout.state_bytes;
    Scratch state(states + range * layout.state_bytes);
    DecodeRows<T> rows(p, z, seq, b, head, scratch);
    const int64_t begin = ranges.begin + range * ranges.keys;
    rows.words(begin, smaller(begin + ranges.keys, ranges.end), Partial<C>(state, z));
    const int64_t finished = __atomic_add_fetch(done + b * p.heads_kv + head, 1, __ATOMIC_ACQ_REL);
    if (finished == ranges.count) rows.finish(states, z, layout.state_bytes, ranges.count);
  });
}

}  // namespace

int64_t decode_workspace(const ZeroGateParams& p, int threads) {
  return with_storage_type(p.dtype, [&](auto type) {
    using C = Compute<decltype(type)>;
    const Workspace<C> layout(p, sizes_of<C>(p));
    return layout.workers + threads * layout.scratch_bytes;
  });
}

void decode(const ZeroGateParams& p, const Parallel& parallel) {
  with_storage_type(p.dtype, [&](auto type) {
    decode_typed<decltype(type)>(p, parallel);
    return 0;
  });
}

}  // namespace lak::cpu::LAK_ISA
