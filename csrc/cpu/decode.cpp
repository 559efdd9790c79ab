// Decode: few new queries against a long key/value cache. Bound by memory: every key and value is read once, for all
// query heads of its group and all new queries.
//
// One task is one range of keys of one key/value head. For a tile of keys it computes the scores of all rows (a row is
// one query of one query head), takes one online softmax step per row and adds P V. Memory must be busy all that time, and
// must never be asked for more lines at once than a core can wait for (some two dozen: what comes on top stalls it). So the
// scores of a tile are computed piece by piece between the pieces of the sums of the tile before, and while they read a
// line of keys they ask for one of that tile's values and one of the next tile's keys.
//
// Inside, head_dim has the order of load_half: queries are put into it at the start, outputs taken out of it at the end.
// Whoever finishes the last range of a head combines all of them in their order and adds the prefix. Ranges depend on a
// sequence's own keys and on the number of rows: results are the same for every number of threads, and beside any other
// sequence.
#include "kernel_table.h"
#include "tiles.h"

namespace lak::cpu::LAK_ISA {
namespace {

// Keys of a tile: as many as fill 4 KiB, but 16 at least. Three tiles are in L1 at once (the keys of one, the values of the one
// before, and what has been asked for); on a Zen 3 6 and 8 KiB do as well with four queries on each key, worse with one.
constexpr int64_t kTileBytes = 4 << 10, kFewestTileKeys = 16, kTileKeys = 256;  // the last: the most
constexpr int64_t kCacheLine = 64;
// The most rows that share one read of a tile. Their scores lie side by side, [key][row]: a vector holds some keys of all.
template <class C>
constexpr int kChunk = kLanes<C> < 4 ? kLanes<C> : 4;
constexpr int kSoftmaxChains = 2;  // vectors in turn, so that one's latencies hide behind the others

// How the keys that a sequence sees are cut into ranges: as evenly as whole tiles allow. 513 keys are one range, because a
// second one of a single key would cost as much as two hundred keys do.
struct Ranges {
  int64_t begin, end, keys, count;  // range i: keys [begin + i * keys, end of that or `end`)

  static constexpr int64_t kMost = 32;        // enough for many threads on one head; the combination stays cheap
  static constexpr int64_t kUsualKeys = 512;  // of a range: a task of some 50 us; ranges have 0.75 to 1.5 times as many

  // The count for that many keys, which never falls as they grow. Many rows: their states are a fraction of the keys.
  static int64_t most(int64_t seen, int64_t rows) {
    const int64_t usual = larger(kUsualKeys, 32 * rows);
    return larger(1, smaller(kMost, (seen + usual / 2) / usual));
  }

  Ranges(const Sequence& seq, int64_t rows) : begin(seq.key_begin), end(visible_end(seq, seq.queries - 1)) {
    const int64_t seen = larger(0, end - begin), wanted = most(seen, rows);
    keys = larger(64, round_up((seen + wanted - 1) / wanted, 64));
    count = larger(1, (seen + keys - 1) / keys);
  }
};

// Sizes every task shares.
struct Sizes {
  int64_t rows, chunks, padded_depth, most_ranges;
};

template <class C>
Sizes sizes_of(const ZeroGateParams& params) {
  const int64_t rows = params.heads_kv > 0 ? params.heads_q / params.heads_kv * params.seq_q : 0;
  const int64_t chunks = (rows + kChunk<C> - 1) / kChunk<C>;
  return {rows, chunks, round_up(params.head_dim, 2 * kLanes<C>), Ranges::most(params.seq_k, rows)};
}

// The state of an online softmax over rows.
template <class C>
struct Partial {
  C *maximum, *sum;  // [chunks][kLanes]: a vector for the rows of a chunk, see softmax
  C* accumulator;    // [chunks][kChunk][padded_depth]
  Partial(Scratch& memory, const Sizes& sizes)
      : maximum(memory.take<C>(sizes.chunks * kLanes<C>)), sum(memory.take<C>(sizes.chunks * kLanes<C>)),
        accumulator(memory.take<C>(sizes.chunks * kChunk<C> * sizes.padded_depth)) {}
};

template <class C>
struct DecodeScratch {
  Partial<C> prefix;
  C* query;                  // [chunks][kChunk][padded_depth], scaled; zeros beyond the last row
  C* ordered;                // [padded_depth]: an output row in the order of memory
  C* scores;                 // 2 x [kTileKeys][kChunk]; what is written at once divides a full tile
  C *key_tail, *value_tail;  // [kTileKeys][2 kLanes]: what of head_dim does not fill a pair, padded with zeros
  DecodeScratch(Scratch& memory, const Sizes& sizes)
      : prefix(memory, sizes), query(memory.take<C>(sizes.chunks * kChunk<C> * sizes.padded_depth)),
        ordered(memory.take<C>(sizes.padded_depth)), scores(memory.take<C>(2 * kTileKeys * kChunk<C>)),
        key_tail(memory.take<C>(kTileKeys * 2 * kLanes<C>)), value_tail(memory.take<C>(kTileKeys * 2 * kLanes<C>)) {}
};

template <template <class> class Part, class C>
int64_t bytes_of(const Sizes& sizes) {
  Scratch counter(nullptr);
  Part<C> part(counter, sizes);
  return counter.used();
}

// Lane i: the horizontal sum of v[i], of kLanes vectors. Each round halves their number by adding lanes of two of them:
// neighbours (which one instruction brings together) until every 16 bytes hold the sums of their own vectors, then whole 16
// bytes.
template <class C, int kHalf = 1>
LAK_INLINE Vec<C> sum_each(Vec<C>* v) {
  constexpr int kLane = kLanes<C>, kInner = 16 / static_cast<int>(sizeof(C));
  if constexpr (kHalf == kLane) {
    return v[0];
  } else {
    IntVec<C> low{}, high{};  // an index >= lanes selects from the second operand
    for (int lane = 0; lane < kLane; ++lane) {
      if (kHalf < kInner) {
        const int place = lane % kInner * 2;
        low[lane] = lane / kInner * kInner + (place < kInner ? place : place - kInner + kLane);
        high[lane] = low[lane] + 1;
      } else {
        low[lane] = lane & kHalf ? lane - kHalf + kLane : lane;
        high[lane] = lane & kHalf ? lane + kLane : lane + kHalf;
      }
    }
    unrolled<kLane / (2 * kHalf)>([&](auto pair) LAK_INLINE_LAMBDA {
      constexpr int kAt = 2 * kHalf * pair;
      v[kAt] = __builtin_shuffle(v[kAt], v[kAt + kHalf], low) + __builtin_shuffle(v[kAt], v[kAt + kHalf], high);
    });
    return sum_each<C, 2 * kHalf>(v);
  }
}

// Lane i: all lanes i % kRows combined.
template <class C, int kRows, class Combine>
LAK_INLINE Vec<C> fold(Vec<C> v, const Combine& combine) {
#pragma GCC unroll 4
  for (int half = kLanes<C> / 2; half >= kRows; half /= 2) {
    IntVec<C> other{};
    for (int lane = 0; lane < kLanes<C>; ++lane) other[lane] = lane ^ half;
    v = combine(v, __builtin_shuffle(v, other));
  }
  return v;
}

// Memory that will be read soon, row by row, and is asked for one cache line at a time. There may be fewer rows than lines
// asked for: a prefetch of anything is harmless.
struct Ahead {
  const char* row;
  int64_t stride, bytes;  // bytes from row to row, and of a row
  int64_t at = 0;

  Ahead from(int64_t first) const { return {row + first * stride, stride, bytes}; }

  LAK_INLINE void prefetch_line() {
    __builtin_prefetch(row + at);
    at += kCacheLine;
    const bool end = at >= bytes;
    row += end ? stride : 0;
    at = end ? 0 : at;
  }
};

// Rows of storage, and beside them the part of each that does not fill a pair (nullptr: there is none).
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
  static constexpr int64_t kLane = kLanes<C>, kPair = 2 * kLane, kChunk = cpu::LAK_ISA::kChunk<C>;
  static constexpr int kSums = kVectorBytes == 64 ? 16 : 8;  // of a group of keys: half of the registers
  static constexpr C kMinusInfinity = -__builtin_huge_val();

 public:
  DecodeRows(const ZeroGateParams& problem, const Sizes& sizes, const Sequence& sequence, int64_t b, int64_t kv_head,
             const DecodeScratch<C>& memory)
      : params(problem), seq(sequence), scratch(memory), batch(b), head_kv(kv_head), group(problem.heads_q / problem.heads_kv),
        rows(sizes.rows), depth(problem.head_dim), padded_depth(sizes.padded_depth), whole(depth / kPair * kPair),
        tile_keys(larger(kFewestTileKeys, smaller(kTileKeys, kTileBytes / row_bytes(depth) / 16 * 16))) {
    for (int64_t row = 0; row < rows; ++row) {
      C* to = scratch.query + row * padded_depth;
      arrange_row(row_pointer<const T>(params.query, batch, head_of(row), query_of(row)), depth, to);
      for (int64_t d = 0; d < padded_depth; ++d) to[d] *= static_cast<C>(params.scale);
    }
    for (int64_t i = rows * padded_depth; i < sizes.chunks * kChunk * padded_depth; ++i) scratch.query[i] = 0;
  }

  // The prefix was last read a layer's weights ago and comes from memory, row by row, with nothing to hide that behind: it is
  // asked for before the words.
  void prefetch_prefix() const {
    if (seq.prefix < 0) return;
    constexpr int64_t kMostBytes = 16 << 10;  // of keys and of values: what stays in L2 beside the words
    const int64_t lines = (row_bytes(depth) + kCacheLine - 1) / kCacheLine;
    const int64_t slots = smaller(params.prefix_length, kMostBytes / row_bytes(depth));
    Ahead keys = ahead(params.prefix_key, seq.prefix, 0), values = ahead(params.prefix_value, seq.prefix, 0);
    for (int64_t line = 0; line < slots * lines; ++line) keys.prefetch_line(), values.prefetch_line();
  }

  void words(int64_t begin, int64_t end, const Partial<C>& state) {
    attend(params.key, params.value, batch, begin, end, seq.diagonal + 1, state);
  }

  // Combines `count` states that lie `state_bytes` apart, adds the prefix and writes the output rows.
  void finish(const char* states, const Sizes& sizes, int64_t state_bytes, int64_t count) {
    if (seq.prefix >= 0) {
      attend(params.prefix_key, params.prefix_value, seq.prefix, 0, params.prefix_length, params.prefix_length, scratch.prefix);
    }
    const auto state = [&](int64_t i) {
      Scratch memory(const_cast<char*>(states) + i * state_bytes);
      return Partial<C>(memory, sizes);
    };
    for (int64_t row = 0; row < rows; ++row) {
      C highest = kMinusInfinity, sum = 0;
      for (int64_t i = 0; i < count; ++i) highest = larger_of(maximum_of(state(i), row), highest);
      const C reference = highest == kMinusInfinity ? C(0) : highest;
      C* out = scratch.query + row * padded_depth;  // the scaled queries are not needed any more
      for (int64_t d = 0; d < padded_depth; ++d) out[d] = 0;
      for (int64_t i = 0; i < count; ++i) {
        const Partial<C> part = state(i);
        const C factor = shrinking(maximum_of(part, row), reference);
        sum += factor * sum_of(part, row);
        add_scaled(part.accumulator + row * padded_depth, factor, out);
      }
      const C inverse = sum == 0 ? C(0) : C(1) / sum;  // 0: the row sees no key; NaN stays NaN
      for (int64_t d = 0; d < padded_depth; ++d) out[d] *= inverse;
      if (seq.prefix >= 0) {
        const C gate = gate_of<C>(params, seq.prefix, head_of(row));
        add_scaled(scratch.prefix.accumulator + row * padded_depth, gate / sum_of(scratch.prefix, row), out);
      }
      for (int64_t d = 0; d < depth; ++d) scratch.ordered[d] = out[d / kPair * kPair + place_in_pair<T, C>(d % kPair)];
      narrow_row(scratch.ordered, C(1), depth, row_pointer<T>(params.output, batch, head_of(row), query_of(row)));
      if (params.logsumexp.data) {
        *row_statistic<C>(params.logsumexp, batch, head_of(row), query_of(row)) =
            sum == 0 ? kMinusInfinity : static_cast<C>(highest + __builtin_log(static_cast<double>(sum)));
      }
    }
  }

 private:
  int64_t head_of(int64_t row) const { return head_kv * group + row / params.seq_q; }
  int64_t query_of(int64_t row) const { return row % params.seq_q; }
  static int64_t row_bytes(int64_t depth) { return larger(1, depth * static_cast<int64_t>(sizeof(T))); }
  // How many rows of the chunk that contains `row` are computed: all, with zeros for queries, where 3 are left.
  int64_t rows_together(int64_t row) const {
    const int64_t left = rows - row / kChunk * kChunk;
    return left > 2 ? kChunk : left;
  }
  C maximum_of(const Partial<C>& part, int64_t row) const { return part.maximum[row / kChunk * kLane + row % kChunk]; }
  C sum_of(const Partial<C>& part, int64_t row) const {
    C sum = 0;
    for (int64_t i = row % kChunk; i < kLane; i += rows_together(row)) sum += part.sum[row / kChunk * kLane + i];
    return sum;
  }
  static C larger_of(C a, C b) { return a > b ? a : b; }
  // What a sum relative to `maximum_then` shrinks by when it becomes relative to `reference`.
  static C shrinking(C maximum_then, C reference) {
    return exp2_nonpositive(broadcast((maximum_then - reference) * static_cast<C>(kLog2E)))[0];
  }

  void add_scaled(const C* from, C factor, C* to) const {
    for (int64_t d = 0; d < padded_depth; d += kLane) store(to + d, load(to + d) + broadcast(factor) * load(from + d));
  }

  // `n` elements into the order of pairs, the last pair padded with zeros.
  static void arrange_row(const T* from, int64_t n, C* to) {
    const auto arrange = [](const T* pair, C* place) {
      store(place, load_half<0>(pair));
      store(place + kLane, load_half<1>(pair));
    };
    int64_t d = 0;
    for (; d + kPair <= n; d += kPair) arrange(from + d, to + d);
    if (d == n) return;
    T last[kPair] = {};
    __builtin_memcpy(last, from + d, (n - d) * sizeof(T));
    arrange(last, to + d);
  }

  TileRows<T> tile_of(const TensorView& view, int64_t b, int64_t first, int64_t n, C* tail) const {
    const T* data = row_pointer<const T>(view, b, head_kv, first);
    if (whole == depth) return {data, view.stride_row, nullptr, n};
    for (int64_t t = 0; t < n; ++t) {
      arrange_row(data + t * view.stride_row + whole, depth - whole, tail + t * kPair);
    }
    return {data, view.stride_row, tail, n};
  }
  Ahead ahead(const TensorView& view, int64_t b, int64_t first) const {
    constexpr int64_t kSize = sizeof(T);
    return {reinterpret_cast<const char*>(row_pointer<const T>(view, b, head_kv, first)), view.stride_row * kSize,
            depth * kSize};
  }
  Ahead nothing_ahead() const { return {reinterpret_cast<const char*>(scratch.scores), 0, kCacheLine}; }  // one line, in cache

  // One chunk of rows on one tile of keys.
  struct Step {
    int64_t k0, n, row;
    C* scores;
    TileRows<T> k;
    Ahead values, keys;  // this tile's values, the next tile's keys
  };

  // Online softmax of all rows over keys [begin, end); query i sees those below limit + i. The scores of one step are computed
  // between the sums of the step before, so that memory is asked for new keys and values all the time. Not inlined: the prefix
  // finds the instructions in cache that the words have fetched.
  __attribute__((noinline)) void attend(const TensorView& k_view, const TensorView& v_view, int64_t b, int64_t begin,
                                        int64_t end, int64_t limit, const Partial<C>& state) {
    const int64_t chunks = (rows + kChunk - 1) / kChunk;
    for (int64_t i = 0; i < chunks * kLane; ++i) state.maximum[i] = kMinusInfinity, state.sum[i] = 0;
    for (int64_t i = 0; i < chunks * kChunk * padded_depth; ++i) state.accumulator[i] = 0;
    const auto step_at = [&](int64_t k0, int64_t row, C* scores) {
      Step step{k0, smaller(tile_keys, end - k0), row, scores, {}, nothing_ahead(), nothing_ahead()};
      if (step.n <= 0) return step;
      if (row == 0) {
        step.k = tile_of(k_view, b, k0, step.n, scratch.key_tail);
        step.values = ahead(v_view, b, k0);
        if (k0 + step.n < end) step.keys = ahead(k_view, b, k0 + step.n);
      } else {  // the first chunk has asked for all that, and filled the tail
        step.k = {row_pointer<const T>(k_view, b, head_kv, k0), k_view.stride_row, whole == depth ? nullptr : scratch.key_tail,
                  step.n};
      }
      return step;
    };
    C* other_scores = scratch.scores + kTileKeys * kChunk;
    Step step = step_at(begin, 0, scratch.scores);
    dot_products(step, 0, 1);
    while (step.n > 0) {
      const bool last_chunk = step.row + kChunk >= rows;
      const Step next = step_at(last_chunk ? step.k0 + step.n : step.k0, last_chunk ? 0 : step.row + kChunk,
                                step.scores == scratch.scores ? other_scores : scratch.scores);
      with_rows(step.row, [&](auto chunk_rows) LAK_INLINE_LAMBDA {
        constexpr int kCount = chunk_rows;
        alignas(kVectorBytes) C rescale[kLane];
        for (int64_t r = 0; r < smaller(kCount, rows - step.row); ++r) {
          for (int64_t t = larger(0, limit + query_of(step.row + r) - step.k0); t < step.n; ++t)
            step.scores[t * kCount + r] = kMinusInfinity;
        }
        const int64_t chunk = step.row / kChunk * kLane;
        softmax<kCount>(step.n, step.scores, state.maximum + chunk, state.sum + chunk, rescale);
        if (step.row == 0 && whole != depth) tile_of(v_view, b, step.k0, step.n, scratch.value_tail);
        const TileRows<T> v{row_pointer<const T>(v_view, b, head_kv, step.k0), v_view.stride_row,
                            whole == depth ? nullptr : scratch.value_tail, step.n};
        weighted_sum<kCount>(v, step.scores, rescale, state.accumulator + step.row * padded_depth, next);
      });
      step = next;
    }
  }

  // f(how many rows of the chunk are computed), as a constant.
  template <class F>
  void with_rows(int64_t row, const F& f) const {
    switch (rows_together(row)) {
      case 1: return f(std::integral_constant<int, 1>{});
      case 2: return f(std::integral_constant<int, 2>{});
      default: return f(std::integral_constant<int, kChunk>{});
    }
  }

  // One of `parts` parts of a step's scores: scores[t][r] = Q[row + r] . K[t]; beyond the last key there is anything.
  void dot_products(const Step& step, int64_t part, int64_t parts) {
    if (step.n <= 0) return;
    with_rows(step.row, [&](auto chunk_rows) LAK_INLINE_LAMBDA {
      constexpr int kCount = chunk_rows, kKeys = kSums / kCount;
      const int64_t groups = (step.n + kKeys - 1) / kKeys;
      const int64_t from = groups * part / parts * kKeys, to = smaller(groups * (part + 1) / parts * kKeys, step.n);
      const C* query = scratch.query + step.row * padded_depth;
      if (step.k.tail) dot_products_of<kCount, true>(step, query, from, to);
      else dot_products_of<kCount, false>(step, query, from, to);
    });
  }

  // kTail is a template argument so that the sums live in registers from end to end.
  template <int kRows, bool kTail>
  __attribute__((noinline)) void dot_products_of(const Step& step, const C* query, int64_t from, int64_t to) {
    constexpr int kKeys = kSums / kRows;
    // Of each stream, as many lines as are read of the keys.
    constexpr int kLines = (kKeys * kPair * static_cast<int>(sizeof(T)) + kCacheLine - 1) / kCacheLine;
    // Copies, because the compiler takes every store for one that may change a member.
    const TileRows<T> k = step.k;
    Ahead values_ahead = step.values.from(from), keys_ahead = step.keys.from(from);
    const int64_t count = k.count, depth_in_pairs = whole, query_stride = padded_depth;
    C* scores = step.scores + from * kRows;
    for (int64_t t = from; t < to; t += kKeys, scores += kSums) {
      const T* key[kKeys];
      unrolled<kKeys>([&](auto i) LAK_INLINE_LAMBDA { key[i] = k.data + smaller(t + i, count - 1) * k.stride; });
      Vec<C> sum[kSums];  // [key][row]
      unrolled<kSums>([&](auto i) LAK_INLINE_LAMBDA { sum[i] = Vec<C>{}; });
      const auto add = [&](const C* q, const auto& element) LAK_INLINE_LAMBDA {
        Vec<C> x[kKeys];
        unrolled<kKeys>([&](auto i) LAK_INLINE_LAMBDA { x[i] = element(i); });
        unrolled<kRows>([&](auto r) LAK_INLINE_LAMBDA {
          const Vec<C> y = in_register<C>(load(q + r * query_stride));
          unrolled<kKeys>([&](auto i) LAK_INLINE_LAMBDA { sum[i * kRows + r] += y * x[i]; });
        });
      };
      for (int64_t d = 0; d < depth_in_pairs; d += kPair) {
        unrolled<kLines>([&](auto) LAK_INLINE_LAMBDA { values_ahead.prefetch_line(), keys_ahead.prefetch_line(); });
        add(query + d, [&](auto i) LAK_INLINE_LAMBDA { return load_half<0>(key[i] + d); });
        add(query + d + kLane, [&](auto i) LAK_INLINE_LAMBDA { return load_half<1>(key[i] + d); });
      }
      if constexpr (kTail) {
        const auto tail = [&](auto i) LAK_INLINE_LAMBDA { return k.tail + smaller(t + i, count - 1) * kPair; };
        add(query + depth_in_pairs, [&](auto i) LAK_INLINE_LAMBDA { return load(tail(i)); });
        add(query + depth_in_pairs + kLane, [&](auto i) LAK_INLINE_LAMBDA { return load(tail(i) + kLane); });
      }
      unrolled<kSums / kLanes<C>>([&](auto i) LAK_INLINE_LAMBDA { store(scores + i * kLane, sum_each<C>(sum + i * kLane)); });
    }
  }

  // One step of the online softmax: scores [n][kRows] become probabilities against the rows' new maxima. maximum_so_far and
  // sum_so_far hold a vector; lane i belongs to row i % kRows, and the sums are added over lanes at the very end. rescale,
  // likewise: what the old sums shrink by.
  template <int kRows>
  __attribute__((noinline)) void softmax(int64_t n, C* scores, C* maximum_so_far, C* sum_so_far, C* rescale) {
    const int64_t end = round_up(n * kRows, kSoftmaxChains * kLane);
    for (int64_t i = n * kRows; i < end; ++i) scores[i] = kMinusInfinity;
    const auto larger_of_each = [](Vec<C> a, Vec<C> b) LAK_INLINE_LAMBDA { return maximum<C>(a, b); };  // NaN: the second
    const Vec<C> log2e = broadcast(static_cast<C>(kLog2E)), before = load(maximum_so_far);
    Vec<C> highest[kSoftmaxChains], sum[kSoftmaxChains];
    unrolled<kSoftmaxChains>([&](auto c) LAK_INLINE_LAMBDA { highest[c] = before, sum[c] = Vec<C>{}; });
    for (int64_t i = 0; i < end; i += kSoftmaxChains * kLane) {
      unrolled<kSoftmaxChains>(
          [&](auto c) LAK_INLINE_LAMBDA { highest[c] = larger_of_each(load(scores + i + c * kLane), highest[c]); });
    }
    unrolled<kSoftmaxChains - 1>([&](auto c) LAK_INLINE_LAMBDA { highest[0] = larger_of_each(highest[c + 1], highest[0]); });
    const Vec<C> top = fold<C, kRows>(highest[0], larger_of_each);
    const Vec<C> reference = top == broadcast(kMinusInfinity) ? Vec<C>{} : top;
    for (int64_t i = 0; i < end; i += kSoftmaxChains * kLane) {
      unrolled<kSoftmaxChains>([&](auto c) LAK_INLINE_LAMBDA {
        C* at = scores + i + c * kLane;
        const Vec<C> probability = exp2_nonpositive((load(at) - reference) * log2e);
        store(at, probability);
        sum[c] += probability;
      });
    }
    unrolled<kSoftmaxChains - 1>([&](auto c) LAK_INLINE_LAMBDA { sum[0] += sum[c + 1]; });
    const Vec<C> shrinking_by = exp2_nonpositive((before - reference) * log2e);
    store(rescale, shrinking_by);
    store(maximum_so_far, top);
    store(sum_so_far, load(sum_so_far) * shrinking_by + sum[0]);
  }

  // out[r] = rescale[r] * out[r] + sum_t scores[t][r] V[t]. Between its blocks of columns: the scores of the next step.
  template <int kRows>
  void weighted_sum(const TileRows<T>& v, const C* scores, const C* rescale, C* out, const Step& next) {
    constexpr int64_t kMost = kVectorBytes == 64 ? (kRows > 2 ? 2 : 4) : 4 / kRows;  // pairs of a block: 8 or 16 sums
    const int64_t blocks = larger(1, (whole / kPair + kMost - 1) / kMost);
    int64_t block = 0;
    for (int64_t d = 0; d < whole; d += kMost * kPair) {
      const int64_t pairs = smaller(kMost, (whole - d) / kPair);
      unrolled<kMost>([&](auto less) LAK_INLINE_LAMBDA {
        constexpr int kWidth = less + 1;
        if (pairs == kWidth) block_of<kRows, kWidth>(v.data + d, v.stride, v.count, scores, rescale, out + d);
      });
      dot_products(next, block++, blocks);
    }
    if (v.tail) block_of<kRows, 1>(v.tail, kPair, v.count, scores, rescale, out + whole);
    if (whole == 0) dot_products(next, 0, 1);
  }

  // Sums begin at zero and meet the old ones at the end: short chains of additions round less.
  template <int kRows, int kPairs, class S>
  __attribute__((noinline)) void block_of(const S* v, int64_t stride, int64_t n, const C* weights, const C* rescale, C* out) {
    constexpr int kVecs = 2 * kPairs;
    Vec<C> sum[kRows * kVecs];
    unrolled<kRows * kVecs>([&](auto i) LAK_INLINE_LAMBDA { sum[i] = Vec<C>{}; });
    for (int64_t t = 0; t < n; ++t, v += stride, weights += kRows) {
      Vec<C> weight[kRows];
      unrolled<kRows>([&](auto r) LAK_INLINE_LAMBDA { weight[r] = in_register<C>(broadcast(weights[r])); });
      unrolled<kVecs>([&](auto i) LAK_INLINE_LAMBDA {
        const Vec<C> value = in_register<C>(load_half<i % 2>(v + i / 2 * kPair));
        unrolled<kRows>([&](auto r) LAK_INLINE_LAMBDA { sum[r * kVecs + i] += weight[r] * value; });
      });
    }
    unrolled<kRows * kVecs>([&](auto i) LAK_INLINE_LAMBDA {
      C* to = out + i / kVecs * padded_depth + i % kVecs * kLane;
      store(to, load(to) * broadcast(rescale[i / kVecs]) + sum[i]);
    });
  }

  const ZeroGateParams& params;
  const Sequence& seq;
  const DecodeScratch<C>& scratch;
  const int64_t batch, head_kv, group, rows, depth, padded_depth;
  const int64_t whole;  // the part of head_dim that fills pairs
  const int64_t tile_keys;
};

// Workspace: how many ranges of each head are done, the ranges' states, a scratch per worker.
template <class C>
struct Workspace {
  int64_t counters, state_bytes, scratch_bytes, states, workers;

  Workspace(const ZeroGateParams& params, const Sizes& sizes)
      : counters(round_up(params.batch * params.heads_kv * static_cast<int64_t>(sizeof(int64_t)), 64)),
        state_bytes(bytes_of<Partial, C>(sizes)), scratch_bytes(bytes_of<DecodeScratch, C>(sizes)), states(counters),
        workers(states + params.batch * params.heads_kv * sizes.most_ranges * state_bytes) {}
};

template <class T>
void decode_typed(const ZeroGateParams& params, const Parallel& parallel) {
  using C = Compute<T>;
  const Sizes sizes = sizes_of<C>(params);
  const Workspace<C> layout(params, sizes);
  const int64_t heads = params.batch * params.heads_kv, tasks = heads * sizes.most_ranges;
  if (tasks == 0) return;
  char* memory = static_cast<char*>(params.workspace);
  int64_t* done = reinterpret_cast<int64_t*>(memory);
  for (int64_t i = 0; i < heads; ++i) done[i] = 0;
  // Ranges of keys follow each other in memory; where heads lie side by side (a [batch, keys, heads, head_dim] cache),
  // the same range of all heads does, and shares its pages.
  const bool heads_side_by_side = params.key.stride_head < params.key.stride_row;
  run_tasks(parallel, tasks, [&](int64_t task, int64_t worker) {
    const int64_t b = task / (params.heads_kv * sizes.most_ranges), rest = task % (params.heads_kv * sizes.most_ranges);
    const int64_t range = heads_side_by_side ? rest / params.heads_kv : rest % sizes.most_ranges;
    const int64_t head = heads_side_by_side ? rest % params.heads_kv : rest / sizes.most_ranges;
    const Sequence seq = sequence_of(params, b);
    const Ranges ranges(seq, sizes.rows);
    if (range >= ranges.count) return;
    Scratch own(memory + layout.workers + worker * layout.scratch_bytes);
    const DecodeScratch<C> scratch(own, sizes);
    char* states = memory + layout.states + (b * params.heads_kv + head) * sizes.most_ranges * layout.state_bytes;
    Scratch state(states + range * layout.state_bytes);
    DecodeRows<T> rows(params, sizes, seq, b, head, scratch);
    if (range + 1 == ranges.count) rows.prefetch_prefix();
    const int64_t begin = ranges.begin + range * ranges.keys;
    rows.words(begin, smaller(begin + ranges.keys, ranges.end), Partial<C>(state, sizes));
    const int64_t finished = __atomic_add_fetch(done + b * params.heads_kv + head, 1, __ATOMIC_ACQ_REL);
    if (finished == ranges.count) rows.finish(states, sizes, layout.state_bytes, ranges.count);
  });
}

}  // namespace

int64_t decode_workspace(const ZeroGateParams& params, int threads) {
  return with_storage_type(params.dtype, [&](auto type) {
    using C = Compute<decltype(type)>;
    const Workspace<C> layout(params, sizes_of<C>(params));
    return layout.workers + threads * layout.scratch_bytes;
  });
}

void decode(const ZeroGateParams& params, const Parallel& parallel) {
  with_storage_type(params.dtype, [&](auto type) {
    decode_typed<decltype(type)>(params, parallel);
    return 0;
  });
}

}  // namespace lak::cpu::LAK_ISA
