// Backward of the words where several blocks share the keys of a query: a block owns kKeys keys of one kv head, goes over the
// queries of the group that see them, sums dK and dV in registers, and adds its part of dQ to the other blocks' with reductions
// in float32. No product is computed twice; the order in which dQ is added varies from run to run.
#pragma once

#include "sm80/backward/pair.h"

namespace lak::sm80 {

template <class T, int kHeadDim, int kWarpsOfBlock>
__global__ void __launch_bounds__(32 * kWarpsOfBlock, (kWarpsOfBlock == 8 ? 1 : 2))
    backward_keys_kernel(const __grid_constant__ ZeroGateParams params, int key_tiles) {
  using Tiles = WordTiles<T, kHeadDim, kWarpsOfBlock>;
  using Grid = typename Tiles::KeyGradients;
  if (is_token_tiled(params)) __builtin_unreachable();
  const PairMemory<T, kHeadDim, Tiles> memory(ptx::dynamic_shared_memory());
  const int first_key = static_cast<int>(blockIdx.x % key_tiles) * Tiles::kKeys;  // the first keys are seen by the most queries
  const int head_kv = static_cast<int>(blockIdx.x / key_tiles % params.heads_kv);
  const int b = static_cast<int>(blockIdx.x / key_tiles / params.heads_kv);
  const Sequence s = sequence_of(params, b);
  if (first_key >= s.key_rows) return;
  const BackwardWorkspace workspace = backward_workspace<T, kHeadDim>(params);
  const PairCopies<T, kHeadDim, Tiles> copies{params, memory, s, b, head_kv};
  float dkey[Grid::kM][Grid::kN][4], dvalue[Grid::kM][Grid::kN][4];
  set_zero(dkey);
  set_zero(dvalue);
  copies.key(first_key);
  copies.value(first_key);
  ptx::commit_async_copies();
  const Window tiles = row_tiles_seeing<Tiles>(params, s, first_key);
  add_over_queries<true>(copies, workspace, first_key, [&] { return tiles; }, -1, dkey, dvalue);
  const int same_first = static_cast<int>(ptx::block_index() % key_tiles) * Tiles::kKeys;
  const Sequence same = sequence_of(params, b);
  const PairCopies<T, kHeadDim, Tiles> same_copies{params, memory, same, b, head_kv};
  store_key_gradients(same_copies, same_first, Part::kAll, dkey, dvalue);
}

// dQ = scale x (the words' sums + dS_p Kp): a block 64 rows of one head. Without a prefix the second part is nothing.
//
// Shared memory: prefix K [16, D].
template <class T, int kHeadDim>
__global__ void __launch_bounds__(kThreads)
    convert_dquery_kernel(const __grid_constant__ ZeroGateParams params, int row_tiles) {
  constexpr int kD = kHeadDim / 8;
  const SharedTile<T, kPrefixTile, kHeadDim> prefix_key{ptx::dynamic_shared_memory()};
  const BackwardWorkspace workspace = backward_workspace<T, kHeadDim>(params);
  const int first_row = static_cast<int>(blockIdx.x % row_tiles) * 16 * kWarps, row = first_row + 16 * warp_id();
  const int head = static_cast<int>(blockIdx.x / row_tiles % params.heads_q),
            b = static_cast<int>(blockIdx.x / row_tiles / params.heads_q);
  const Sequence s = sequence_of(params, b);
  if (first_row >= s.rows) return;
  const int head_dim = static_cast<int>(params.head_dim);
  const float* sums = workspace.dquery_fragment(b, head, row, 0);
  float dquery[1][kD][4];
#pragma unroll
  for (int n = 0; n < kD; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      dquery[0][n][e] = 8 * n < head_dim ? ptx::load_global(sums + 128 * n + 32 * e + lane_id()) : 0.0f;
    }
  }
  const int head_kv = head / static_cast<int>(params.heads_q / params.heads_kv);
  for (int slot = 0; slot < s.slots; slot += kPrefixTile) {
    if (slot > 0) __syncthreads();
    copy_rows<kThreads>(prefix_key, head_pointer<const T>(params.prefix_key, s.prefix, head_kv, 0),
                        params.prefix_key.stride_row, slot, 0, s.slots, head_dim, threadIdx.x);
    ptx::commit_async_copies();
    ptx::wait_async_copies<0>();
    __syncthreads();
    add_prefix_product(dquery, prefix_key, workspace, b, head, row, slot, 0);
  }
  store_rows<kD>(head_pointer<T>(params.dquery, b, head, s.first_query), params.dquery.stride_row, row, s.rows, dquery[0],
                 static_cast<float>(params.scale) * (s.bad_prefix ? gate_of(params, s, head) : 1.0f), 0, head_dim, s.queries);
}

}  // namespace lak::sm80
