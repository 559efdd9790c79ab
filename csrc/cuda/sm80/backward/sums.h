// Backward, last kernels: partial sums of the prefix's gradients are added in a fixed order.
#pragma once

#include "sm80/backward/workspace.h"
#include "sm80/fragments.h"

namespace lak::sm80 {

// The gradients of [A, Hkv, P, D] and, after them, the gates of [A, Hq]: a thread each, over the blocks of the rows kernel that
// used entry a, in their order.
template <class T, int kHeadDim>
__global__ void __launch_bounds__(kThreads) backward_sums_kernel(const __grid_constant__ ZeroGateParams params) {
  const BackwardWorkspace workspace = backward_workspace<T, kHeadDim>(params);
  const RowGrid& grid = workspace.grid;
  const int64_t size = params.prefix_length * params.head_dim, group = params.heads_q / params.heads_kv;
  const int64_t elements = params.prefix_count * params.heads_kv * size;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const auto uses = [&](int64_t entry, int outer) {
    if (has_shared_prefix(params)) return params.prefix_length > 0;  // of an empty one there are no partial sums
    const Sequence s = sequence_of(params, outer);
    return s.slots > 0 && s.prefix == entry;
  };
  if (index < elements) {
    const int64_t element = index % size, head_kv = index / size % params.heads_kv, entry = index / size / params.heads_kv;
    float dkey = 0.0f, dvalue = 0.0f;
    for (int outer = 0; outer < grid.outer; ++outer) {
      if (!uses(entry, outer)) continue;
      const int64_t first = (outer * params.heads_q + head_kv * group) * grid.chunks;
      const float* sums = workspace.dprefix + first * 2 * size + element;
      for (int64_t i = 0; i < group * grid.chunks; ++i) {
        dkey += ptx::load_global(sums + i * 2 * size);
        dvalue += ptx::load_global(sums + i * 2 * size + size);
      }
    }
    const int64_t slot = element / params.head_dim, column = element % params.head_dim;
    ptx::store_global(head_pointer<T>(params.dprefix_key, entry, head_kv, slot) + column, ptx::narrow<T>(dkey));
    ptx::store_global(head_pointer<T>(params.dprefix_value, entry, head_kv, slot) + column, ptx::narrow<T>(dvalue));
  } else if (index < elements + params.prefix_count * params.heads_q) {
    const int64_t gate = index - elements, head = gate % params.heads_q, entry = gate / params.heads_q;
    float sum = 0.0f;
    for (int outer = 0; outer < grid.outer; ++outer) {
      if (!uses(entry, outer)) continue;
      const float* sums = workspace.dgate + (outer * params.heads_q + head) * grid.chunks;
      for (int i = 0; i < grid.chunks; ++i) sum += ptx::load_global(sums + i);
    }
    ptx::store_global(static_cast<float*>(params.dgate) + gate, sum);
  }
}

}  // namespace lak::sm80
