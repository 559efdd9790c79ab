// Backward, first kernel: what each row contributes by itself, linear in the sequence.
//
//   prefix:  P_p = softmax(scale Q Kp^T)   dP_p = dO Vp^T   D_p = rowsum(P_p * dP_p)   dS_p = gate P_p * (dP_p - D_p)
//            dgate = sum D_p   dVp = gate P_p^T dO   dKp = scale dS_p^T Q
//   words:   D_w = rowsum(dO * O) - gate D_p, the shift of their probabilities, and the window of keys that the row sees
//
// dS_p is kept for dQ, which begins as dS_p Kp. A block goes over tiles of kRows queries of one head, the copy of the next under
// the work on this one. A warp has 16 rows of the scores, and a quarter of the columns of dKp and dVp, which stay in registers
// to the last tile: one partial sum a block, added to the others in a fixed order by sums.h.
//
// A prefix of more than 16 slots takes a launch for each 16. The first finds the statistics over all of them.
//
// Shared memory: per stage Q, dO [kRows, D]; prefix K, V [16, D]; gate P_p, dS_p [kRows, 16]; a float a warp.
#pragma once

#include "sm80/backward/exact.h"
#include "sm80/backward/workspace.h"
#include "sm80/scores.h"

namespace lak::sm80 {

template <class T, int kHeadDim>
struct RowMemory {
  using Tiles = RowTiles<T, kHeadDim>;
  using RowTile = SharedTile<T, Tiles::kRows, kHeadDim>;
  using SlotTile = SharedTile<T, kPrefixTile, kHeadDim>;
  using WeightTile = SharedTile<T, Tiles::kRows, kPrefixTile>;
  static constexpr int kStage = 2 * RowTile::kBytes;
  static constexpr int kBytes = Tiles::kStages * kStage + 2 * SlotTile::kBytes + 2 * WeightTile::kBytes + kWarps * 4;

  uint32_t base;
  __device__ __forceinline__ RowTile query(int stage) const { return {base + stage * kStage}; }
  __device__ __forceinline__ RowTile doutput(int stage) const { return {base + stage * kStage + RowTile::kBytes}; }
  __device__ __forceinline__ SlotTile prefix_key() const { return {base + Tiles::kStages * kStage}; }
  __device__ __forceinline__ SlotTile prefix_value() const { return {prefix_key().base + SlotTile::kBytes}; }
  __device__ __forceinline__ WeightTile weights() const { return {prefix_value().base + SlotTile::kBytes}; }
  __device__ __forceinline__ WeightTile dscores() const { return {weights().base + WeightTile::kBytes}; }
  __device__ __forceinline__ uint32_t sum_of(int warp) const { return dscores().base + WeightTile::kBytes + warp * 4; }
};

// The rows g and g + 8 of a warp's 16 of O, loaded ahead of the time when rowsum(dO * O) is asked for.
template <class T, int kHeadDim>
struct OutputRows {
  static constexpr int kChunk = 16 / sizeof(T), kChunks = kHeadDim / kChunk / 4;  // of a row, of a lane
  uint4 chunks[2][kChunks];

  __device__ __forceinline__ void load(const T* rows, int64_t stride, const bool (&there)[2], int head_dim) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        const int column = (4 * i + lane_id() % 4) * kChunk;
        const T* at = rows + (lane_id() / 4 + 8 * half) * stride + column;
        const bool valid = there[half] && column < head_dim;
        chunks[half][i] = valid ? ptx::load_global(reinterpret_cast<const uint4*>(at)) : uint4{};
      }
    }
  }
  template <int kRows>
  __device__ __forceinline__ float product(SharedTile<T, kRows, kHeadDim> doutput, int warp_row, int half) const {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const uint32_t at = doutput.chunk(warp_row + lane_id() / 4 + 8 * half, 4 * i + lane_id() % 4);
      sum += product_of_chunks<T>(chunks[half][i], ptx::load_shared<uint4>(at));
    }
    return row_sum(sum);
  }
};

template <class T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, (kIsTuned<T, kHeadDim> ? 2 : 1))
    backward_rows_kernel(const __grid_constant__ ZeroGateParams params, int slot_tile) {
  using Memory = RowMemory<T, kHeadDim>;
  using Tiles = typename Memory::Tiles;
  constexpr int kRows = Tiles::kRows, kColumns = kHeadDim / kWarps;
  const Memory memory{ptx::dynamic_shared_memory()};
  const BackwardWorkspace workspace = backward_workspace<T, kHeadDim>(params);
  const RowGrid& grid = workspace.grid;
  const int thread = threadIdx.x, lane = lane_id(), warp = warp_id(), head_dim = static_cast<int>(params.head_dim);
  const int warp_row = 16 * warp, slot = kPrefixTile * slot_tile, slot_tiles = prefix_tiles(params);

  const int chunk = static_cast<int>(blockIdx.x % grid.chunks);
  const int head = static_cast<int>(blockIdx.x / grid.chunks % params.heads_q);
  const int outer = static_cast<int>(blockIdx.x / grid.chunks / params.heads_q);
  const int head_kv = head / static_cast<int>(params.heads_q / params.heads_kv);
  const int all_tiles = has_shared_prefix(params) ? grid.tiles * static_cast<int>(extent_of(params).sequences) : grid.tiles;
  const int first_tile = chunk * grid.tiles_a_block, end_tile = lower(first_tile + grid.tiles_a_block, all_tiles);
  const auto sequence_at = [&](int tile) { return has_shared_prefix(params) ? tile / grid.tiles : outer; };

  const bool words = (params.dquery.data != nullptr || params.dkey.data != nullptr) && slot_tile == 0;
  const ScoreRule any_rule = score_rule(params, 0, head);
  const bool elementwise = !kIsTuned<T, kHeadDim> || needs_elementwise_scores(params);
  const float before = elementwise ? any_rule.scale_log2 : 1.0f, factor = elementwise ? 1.0f : any_rule.scale_log2;

  const Sequence first_sequence = sequence_of(params, sequence_at(first_tile));
  const int slots = first_sequence.slots;  // the same for all sequences of the block
  const float gate = gate_of(params, first_sequence, head);
  const auto copy_prefix = [&](int from) {
    const T* keys = head_pointer<const T>(params.prefix_key, first_sequence.prefix, head_kv, 0);
    const T* values = head_pointer<const T>(params.prefix_value, first_sequence.prefix, head_kv, 0);
    copy_rows<kThreads>(memory.prefix_key(), keys, params.prefix_key.stride_row, from, 0, slots, head_dim, thread);
    copy_rows<kThreads>(memory.prefix_value(), values, params.prefix_value.stride_row, from, 0, slots, head_dim, thread);
  };
  const auto copy_tile = [&](int tile, int stage) {
    const int b = sequence_at(tile), row = tile % grid.tiles * kRows;
    const Sequence s = sequence_of(params, b);
    copy_rows<kThreads>(memory.query(stage), head_pointer<const T>(params.query, b, head, s.first_query),
                        params.query.stride_row, row, 0, s.queries, head_dim, thread);
    copy_rows<kThreads>(memory.doutput(stage), head_pointer<const T>(params.doutput, b, head, s.first_query),
                        params.doutput.stride_row, row, 0, s.queries, head_dim, thread);
    ptx::commit_async_copies();
  };
  if (slots > 0) copy_prefix(slot);
  copy_tile(first_tile, 0);

  float dprefix_key[1][kColumns / 8][4], dprefix_value[1][kColumns / 8][4], dgate = 0.0f;
  set_zero(dprefix_key);
  set_zero(dprefix_value);
  for (int tile = first_tile; tile < end_tile; ++tile) {
    const int stage = (tile - first_tile) % Tiles::kStages;
    const int b = sequence_at(tile), first_row = tile % grid.tiles * kRows;
    const Sequence s = sequence_of(params, b);
    const int64_t statistics = workspace.row_of(b, head) + first_row + warp_row + lane / 4;  // of the row g of the warp
    const auto query = memory.query(stage), doutput = memory.doutput(stage);
    const bool has_rows = warp_row < kRows;
    bool there[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) there[half] = has_rows && first_row + warp_row + lane / 4 + 8 * half < s.queries;
    OutputRows<T, kHeadDim> output;
    Window windows[2];
    if (words && has_rows) {
      output.load(head_pointer<const T>(params.output, b, head, s.first_query + first_row + warp_row), params.output.stride_row,
                  there, head_dim);
      const int row = first_row + warp_row + lane % 16;
      Window window = window_of(params, s, lower(row, s.queries - 1));
      if (row >= s.queries) window.begin = window.end;
      if (head == 0 && lane < 16) ptx::store_global(workspace.windows + b * workspace.padded_rows + row, window);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        windows[half].begin = __shfl_sync(kAllLanes, window.begin, lane / 4 + 8 * half);
        windows[half].end = __shfl_sync(kAllLanes, window.end, lane / 4 + 8 * half);
      }
    }
    ptx::wait_async_copies<0>();
    __syncthreads();  // the tile is there; every warp is done with the one before
    if (Tiles::kStages == 2 && tile + 1 < end_tile) copy_tile(tile + 1, 1 - stage);

    // The prefix: slots across. Statistics over all tiles of slots, then this one's weights.
    float c[1][2][4], d[1][2][4];  // scores, dP_p
    const auto prefix_products = [&](int from) {
      set_zero(c);
      set_zero(d);
      if (!has_rows) return;
      multiply_abt(c, query, warp_row, memory.prefix_key(), 0);
      multiply_abt(d, doutput, warp_row, memory.prefix_value(), 0);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          c[0][n][e] = from + 8 * n + lane % 4 * 2 + e % 2 < slots ? c[0][n][e] * before : -kInfinity;
        }
      }
    };
    float shift[2] = {}, rest[2] = {}, prefix_delta[2] = {};
    if (slots > 0 && slot_tile == 0) {
      RunningSoftmax softmax;
      for (int from = 0; from < slots; from += kPrefixTile) {
        if (from > 0) {
          __syncthreads();
          copy_prefix(from);
          ptx::commit_async_copies();
          ptx::wait_async_copies<0>();
          __syncthreads();
        }
        prefix_products(from);
        softmax.add(c[0], d[0], factor);
      }
      softmax.finish();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        shift[half] = softmax.largest[half];
        rest[half] = softmax.total[half];
        prefix_delta[half] = softmax.weighted[half] / softmax.total[half];
      }
      if (slot_tiles > 1) {
        __syncthreads();
        copy_prefix(0);
        ptx::commit_async_copies();
        ptx::wait_async_copies<0>();
        __syncthreads();
        prefix_products(0);
        if (has_rows && lane % 4 == 0) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            ptx::store_global(workspace.prefix_shift + statistics + 8 * half, shift[half]);
            ptx::store_global(workspace.prefix_rest + statistics + 8 * half, rest[half]);
            ptx::store_global(workspace.prefix_delta + statistics + 8 * half, prefix_delta[half]);
          }
        }
      }
    } else if (slots > slot) {
      prefix_products(slot);
#pragma unroll
      for (int half = 0; half < 2 && has_rows; ++half) {
        shift[half] = ptx::load_global(workspace.prefix_shift + statistics + 8 * half);
        rest[half] = ptx::load_global(workspace.prefix_rest + statistics + 8 * half);
        prefix_delta[half] = ptx::load_global(workspace.prefix_delta + statistics + 8 * half);
      }
    }
    // The words.
    if (words && has_rows) {
      const RowsOfWarp rows{
          params,     s, score_rule(params, b, head), b, head_kv, first_row + warp_row + lane / 4, {windows[0], windows[1]},
          elementwise};
      float delta[2], logsumexp[2];
      bool few[2], from_keys[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        delta[half] = output.product(doutput, warp_row, half) - gate * prefix_delta[half];
        few[half] = windows[half].end - windows[half].begin <= kFewKeys;
        const int64_t at = statistic_row(params, s, b, head) + rows.row + 8 * half;
        logsumexp[half] = there[half] ? ptx::load_global(static_cast<const float*>(params.logsumexp.data) + at) : -kInfinity;
      }
      if (params.mask.type != MaskType::kNone) find_few_keys(rows, there, few);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const bool any_key = logsumexp[half] != -kInfinity, fits = fabsf(delta[half]) < kInfinity;
        const bool coarse = fabsf(logsumexp[half]) > kCoarseLogsumexp<T>;
        from_keys[half] = any_key && !s.bad_prefix && (few[half] || coarse || !fits);
      }
      RunningSoftmax softmax;
      if (__any_sync(kAllLanes, from_keys[0] || from_keys[1])) {
        softmax = softmax_of_words(rows, query, doutput, warp_row, from_keys);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (lane % 4 != 0) continue;
        float word_shift = 0.0f, word_rest = 0.0f;
        if (from_keys[half]) {
          delta[half] = softmax.weighted[half] / softmax.total[half];
          word_shift = softmax.largest[half];
          word_rest = ptx::log2_fast(softmax.total[half]);
          if (kIsHalf<T>) word_shift += word_rest / factor;
        } else if (logsumexp[half] != -kInfinity) {
          const double exact = logsumexp[half] * kLog2E;
          word_shift = static_cast<float>(exact / factor);
          word_rest = static_cast<float>(exact - static_cast<double>(word_shift) * factor);
        }
        ptx::store_global(workspace.shift + statistics + 8 * half, word_shift);
        if (!kIsHalf<T>) ptx::store_global(workspace.rest + statistics + 8 * half, word_rest);
        ptx::store_global(workspace.delta + statistics + 8 * half, delta[half]);
      }
      if (adds_dquery<T, kHeadDim>(params)) {
        float* sums = workspace.dquery_fragment(b, head, first_row + warp_row, 0);
        for (int i = 4 * lane; i < 16 * head_dim; i += 128) ptx::store_global(reinterpret_cast<float4*>(sums + i), float4{});
      }
    }
    if (slots > slot) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (there[half] && lane % 4 == 0) dgate += prefix_delta[half];
        const float part = gate / rest[half];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e) {
            c[0][n][e] = there[half] ? ptx::exp2_fast((c[0][n][e] - shift[half]) * factor) * part : 0.0f;
            d[0][n][e] = there[half] ? c[0][n][e] * (d[0][n][e] - prefix_delta[half]) : 0.0f;
          }
        }
      }
      if (has_rows) {
        store_tile(memory.weights(), warp_row, 0, c);
        store_tile(memory.dscores(), warp_row, 0, d);
      }
      __syncthreads();
      if (params.dquery.data != nullptr) {
        using Piece = std::conditional_t<kIsHalf<T>, uint2, uint4>;
        static_assert(sizeof(Piece) == kDscorePiece * sizeof(T));
        constexpr int kPieces = kPrefixTile / kDscorePiece;
        const int64_t stride = workspace.dscore_slots;
        T* dscores = static_cast<T*>(workspace.dscores) + (workspace.row_of(b, head) + first_row) * stride + slot;
        for (int i = thread; i < kRows * kPieces; i += kThreads) {
          const int row = i / kPieces, column = i % kPieces * kDscorePiece;
          if (slot + column >= stride) continue;
          ptx::store_global(reinterpret_cast<Piece*>(dscores + row * stride + column),
                            ptx::load_shared<Piece>(memory.dscores().element(row, column)));
        }
      }
      if (params.dgate != nullptr) {
        multiply_atb(dprefix_value, memory.weights(), 0, doutput, warp * kColumns);
        multiply_atb(dprefix_key, memory.dscores(), 0, query, warp * kColumns);
      }
    }
    if (Tiles::kStages == 1) {
      __syncthreads();
      if (tile + 1 < end_tile) copy_tile(tile + 1, 0);
    }
  }

  if (params.dgate == nullptr || slots == 0) return;  // nobody reads the partial sums of a sequence without a prefix
  const int64_t partial = (static_cast<int64_t>(outer) * params.heads_q + head) * grid.chunks + chunk;
  const int64_t size = params.prefix_length * params.head_dim;
  float* sums = workspace.dprefix + partial * 2 * size;
  store_rows<kColumns / 8>(sums, head_dim, slot, slots, dprefix_key[0], static_cast<float>(params.scale), warp * kColumns,
                           head_dim, slots);
  store_rows<kColumns / 8>(sums + size, head_dim, slot, slots, dprefix_value[0], 1.0f, warp * kColumns, head_dim, slots);
  if (slot_tile > 0) return;
  // In a fixed order: lanes, then warps.
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) dgate += __shfl_xor_sync(kAllLanes, dgate, lanes);
  if (lane == 0) ptx::store_shared(memory.sum_of(warp), dgate);
  __syncthreads();
  if (thread == 0) {
    float sum = 0.0f;
    for (int w = 0; w < kWarps; ++w) sum += ptx::load_shared<float>(memory.sum_of(w));
    ptx::store_global(workspace.dgate + partial, sum);
  }
}

}  // namespace lak::sm80
