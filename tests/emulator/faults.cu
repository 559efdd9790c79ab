// Kernels with one planted fault each, and their correct twins: what the emulator has to catch.
#include "faults.h"

#include <cuda_runtime.h>

#include <ptx/async_copy.h>
#include <ptx/barrier.h>
#include <ptx/convert.h>
#include <ptx/launch.h>
#include <ptx/matrix.h>
#include <ptx/memory.h>

#include <stdexcept>

namespace {

using namespace lak;

constexpr unsigned kBlock = 64;

// Each thread writes a value and reads its neighbour's.
template <bool kBarrier>
__global__ void neighbour(float* out) {
  const uint32_t base = ptx::dynamic_shared_memory();
  ptx::store_shared(base + threadIdx.x * 4, static_cast<float>(threadIdx.x));
  if (kBarrier) __syncthreads();
  ptx::store_global(out + threadIdx.x, ptx::load_shared<float>(base + (threadIdx.x + 1) % kBlock * 4));
}

// The same in global memory.
template <bool kBarrier>
__global__ void neighbour_in_global_memory(float* out) {
  ptx::store_global(out + threadIdx.x, static_cast<float>(threadIdx.x));
  if (kBarrier) __syncthreads();
  const float other = ptx::load_global(out + (threadIdx.x + 1) % kBlock);
  if (kBarrier) __syncthreads();
  ptx::store_global(out + threadIdx.x, other);
}

__global__ void threads_write_the_same(float* out) { ptx::store_global(out, 1.0f); }

// The second round overwrites what others may still read.
__global__ void missing_second_barrier(float* out) {
  const uint32_t base = ptx::dynamic_shared_memory();
  for (int round = 0; round < 2; ++round) {
    ptx::store_shared(base + threadIdx.x * 4, static_cast<float>(round));
    __syncthreads();
    ptx::store_global(out + threadIdx.x, ptx::load_shared<float>(base + (threadIdx.x + 33) % kBlock * 4));
  }
}

__global__ void missing_warp_sync(float* out) {
  const uint32_t base = ptx::dynamic_shared_memory();
  ptx::store_shared(base + threadIdx.x * 4, 1.0f);
  ptx::store_global(out + threadIdx.x, ptx::load_shared<float>(base + (threadIdx.x ^ 1) * 4));
}

// A sum in registers that begins with whatever they held.
__global__ void uninitialised_registers(float* out) {
  float sums[4];
  for (unsigned i = 0; i < kBlock; ++i) sums[i % 4] += 1.0f;
  ptx::store_global(out + threadIdx.x, sums[threadIdx.x % 4]);
}

template <int kInFlight>
__global__ void wait_for_copy(float* out) {
  const uint32_t base = ptx::dynamic_shared_memory();
  if (threadIdx.x < 16) ptx::copy_async_16(base + threadIdx.x * 16, out + threadIdx.x * 4, true);
  ptx::commit_async_copies();
  ptx::wait_async_copies<kInFlight>();
  __syncthreads();
  ptx::store_global(out + threadIdx.x, ptx::load_shared<float>(base + threadIdx.x * 4) + 1.0f);
}

// The copy is never waited for: it may land in the shared memory of the block that comes next.
template <bool kCommitted>
__global__ void abandoned_copy(float* out) {
  ptx::copy_async_16(ptx::dynamic_shared_memory() + threadIdx.x * 16, out + threadIdx.x * 4, threadIdx.x < 16);
  if (kCommitted) ptx::commit_async_copies();
}

__global__ void shared_off_by_one(float* out) {
  const uint32_t base = ptx::dynamic_shared_memory();
  ptx::store_shared(base + (threadIdx.x + 1) * 4, 1.0f);
  __syncthreads();
  ptx::store_global(out + threadIdx.x, 1.0f);
}

__global__ void global_off_by_one(float* out) { ptx::store_global(out + threadIdx.x + 1, 1.0f); }

__global__ void misaligned_copy(float* out) { ptx::copy_async_16(ptx::dynamic_shared_memory(), out + 1, true); }

__global__ void divergent_barrier(float* out) {
  if (threadIdx.x < 32) __syncthreads();
  ptx::store_global(out + threadIdx.x, 1.0f);
}

__global__ void two_barriers(float* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  ptx::store_global(out + threadIdx.x, 1.0f);
}

// The halves of the block meet at barriers of their own, and never each other.
__global__ void named_barriers(float* out) {
  const unsigned half = threadIdx.x / 64, lane = threadIdx.x % 64, base = ptx::dynamic_shared_memory() + half * 256;
  ptx::store_shared(base + lane * 4, static_cast<float>(lane));
  ptx::named_barrier(1 + half, 64);
  if (half == 1) ptx::store_global(out + lane, ptx::load_shared<float>(base + (lane + 1) % 64 * 4));
}

// Two warps write, two others read: one barrier for all four orders them, one for each pair does not. A fifth warp takes no part.
template <bool kTogether>
__global__ void named_producers(float* out) {
  const unsigned pair = threadIdx.x / 64, lane = threadIdx.x % 64, base = ptx::dynamic_shared_memory();
  if (pair == 2) return;
  for (int round = 0; round < 2; ++round) {
    if (pair == 0) ptx::store_shared(base + lane * 4, static_cast<float>(lane));
    ptx::named_barrier(kTogether ? 1 : 1 + pair, kTogether ? 128 : 64);
    if (pair == 1) ptx::store_global(out + lane, ptx::load_shared<float>(base + (lane + 1) % 64 * 4));
    ptx::named_barrier(kTogether ? 3 : 3 + pair, kTogether ? 128 : 64);
  }
}

__global__ void named_barrier_too_small(float* out) {
  const unsigned warp = threadIdx.x / 32;
  ptx::named_barrier(1, warp == 0 ? 64 : 96);
  ptx::store_global(out + threadIdx.x % 64, 1.0f);
}

__global__ void divergent_shuffle(float* out) {
  float value = 1.0f;
  if (threadIdx.x % 32 < 31) value = __shfl_xor_sync(0xffffffffu, value, 1);
  ptx::store_global(out + threadIdx.x, value);
}

// Two blocks without an order between them.
__global__ void blocks_write_the_same(float* out) { ptx::store_global(out + threadIdx.x, 1.0f); }
__global__ void blocks_read_what_others_write(float* out) {
  const unsigned mine = threadIdx.x / 2 * 2 + blockIdx.x;
  ptx::store_global(out + mine, 1.0f);
  __syncthreads();
  ptx::store_global(out + mine, ptx::load_global(out + (mine ^ 1)));
}
__global__ void blocks_add_to_what_others_read(float* out) {
  if (blockIdx.x == 0) {
    ptx::add_global(out + threadIdx.x, 1.0f);
  } else {
    ptx::load_global(out + threadIdx.x);
  }
}
__global__ void blocks_write_their_own(float* out) {
  if (threadIdx.x % 2 == blockIdx.x) ptx::store_global(out + threadIdx.x, static_cast<float>(blockIdx.x));
}

// Counts how often another block than the last one passes a barrier.
__global__ void blocks_take_turns(float* out) {
  static unsigned arrivals = 0;
  for (int round = 0; round < 16; ++round) {
    __syncthreads();
    if (threadIdx.x != 0) continue;
    static unsigned last = 0;
    if (arrivals++ > 0 && last != blockIdx.x) ptx::add_global(out + 1, 1.0f);
    last = blockIdx.x;
  }
}

// The shared memory that nobody wrote is NaN.
__global__ void uninitialised(float* out) {
  ptx::store_global(out + threadIdx.x, ptx::load_shared<float>(ptx::dynamic_shared_memory() + threadIdx.x * 4));
}

// Each lane of a warp writes four bytes, kStride words from its neighbour's.
template <int kStride>
__global__ void strided(float* out) {
  ptx::store_shared(ptx::dynamic_shared_memory() + threadIdx.x * kStride * 4, 1.0f);
  ptx::store_global(out + threadIdx.x, 1.0f);
}

// 1024 threads and a sum over all of them.
__global__ void many_threads(float* out) { ptx::add_global(out + threadIdx.x % 64, 1.0f); }

// C = A B with A[i][k] = i + k, B = unit matrix: out[r] = C[r][r] through ldmatrix, mma and stmatrix.
__global__ void matrix_round_trip(float* out) {
  const uint32_t base = ptx::dynamic_shared_memory();
  const unsigned lane = threadIdx.x;
  if (lane < 16) {
    for (unsigned k = 0; k < 16; ++k) {
      ptx::store_shared(base + lane * 32 + k * 2, ptx::narrow<BFloat16>(static_cast<float>(lane + k)));
      ptx::store_shared(base + 512 + lane * 32 + k * 2, ptx::narrow<BFloat16>(lane == k ? 1.0f : 0.0f));
    }
  }
  __syncwarp();
  uint32_t a[4], b[4];
  ptx::load_matrices(a, base + lane % 16 * 32 + lane / 16 * 16);
  ptx::load_matrices_transposed(b, base + 512 + lane % 16 * 32 + lane / 16 * 16);
  float c[2][4] = {};
  ptx::mma_m16n8k16<BFloat16>(c[0], a, b[0], b[1]);
  ptx::mma_m16n8k16<BFloat16>(c[1], a, b[2], b[3]);
  __syncwarp();
  const uint32_t packed[4] = {ptx::pack<BFloat16>(c[0][0], c[0][1]), ptx::pack<BFloat16>(c[0][2], c[0][3]),
                              ptx::pack<BFloat16>(c[1][0], c[1][1]), ptx::pack<BFloat16>(c[1][2], c[1][3])};
  ptx::store_matrices(packed, base + lane % 16 * 32 + lane / 16 * 16);
  __syncwarp();
  if (lane < 16) {
    float sum = 0;
    for (unsigned k = 0; k < 16; ++k) sum += ptx::widen(ptx::load_shared<BFloat16>(base + lane * 32 + k * 2));
    ptx::store_global(out + lane, sum);
  }
}

}  // namespace

namespace emulator {

void run_fault(const std::string& name, uint64_t memory) {
  auto* out = reinterpret_cast<float*>(memory);
#define LAK_KERNEL(label, kernel, blocks, threads, bytes)                                         \
  if (name == label) {                                                                            \
    const cudaError_t error = lak::ptx::launch<kernel>(blocks, threads, bytes, nullptr, out);     \
    if (error != cudaSuccess) throw std::runtime_error("launch: error " + std::to_string(error)); \
    return;                                                                                       \
  }
  LAK_KERNEL("barrier", neighbour<true>, 1, kBlock, 256)
  LAK_KERNEL("shared_memory_not_asked_for", neighbour<true>, 1, kBlock, 50 * 1024)
  LAK_KERNEL("too_many_threads", neighbour<true>, 1, 1056, 4224)
  LAK_KERNEL("global_barrier", neighbour_in_global_memory<true>, 1, kBlock, 0)
  LAK_KERNEL("missing_global_barrier", neighbour_in_global_memory<false>, 1, kBlock, 0)
  LAK_KERNEL("threads_write_the_same", threads_write_the_same, 1, kBlock, 0)
  LAK_KERNEL("blocks_write_the_same", blocks_write_the_same, 2, kBlock, 0)
  LAK_KERNEL("blocks_read_what_others_write", blocks_read_what_others_write, 2, kBlock, 0)
  LAK_KERNEL("blocks_add_to_what_others_read", blocks_add_to_what_others_read, 2, kBlock, 0)
  LAK_KERNEL("blocks_write_their_own", blocks_write_their_own, 2, kBlock, 0)
  LAK_KERNEL("blocks_take_turns", blocks_take_turns, 2, kBlock, 0)
  LAK_KERNEL("missing_barrier", neighbour<false>, 1, kBlock, 256)
  LAK_KERNEL("missing_second_barrier", missing_second_barrier, 1, kBlock, 256)
  LAK_KERNEL("missing_warp_sync", missing_warp_sync, 1, 32, 256)
  LAK_KERNEL("waited_copy", wait_for_copy<0>, 1, kBlock, 256)
  LAK_KERNEL("unwaited_copy", wait_for_copy<1>, 1, kBlock, 256)
  LAK_KERNEL("abandoned_copy", abandoned_copy<true>, 1, kBlock, 1024)
  LAK_KERNEL("uncommitted_copy", abandoned_copy<false>, 1, kBlock, 1024)
  LAK_KERNEL("shared_off_by_one", shared_off_by_one, 1, kBlock, 256)
  LAK_KERNEL("global_off_by_one", global_off_by_one, 1, kBlock, 256)
  LAK_KERNEL("misaligned_copy", misaligned_copy, 1, 32, 256)
  LAK_KERNEL("divergent_barrier", divergent_barrier, 1, kBlock, 0)
  LAK_KERNEL("two_barriers", two_barriers, 1, kBlock, 0)
  LAK_KERNEL("named_barriers", named_barriers, 1, 128, 512)
  LAK_KERNEL("named_producers", named_producers<true>, 1, 160, 256)
  LAK_KERNEL("producers_apart", named_producers<false>, 1, 160, 256)
  LAK_KERNEL("named_barrier_too_small", named_barrier_too_small, 1, 96, 0)
  LAK_KERNEL("divergent_shuffle", divergent_shuffle, 1, 32, 0)
  LAK_KERNEL("uninitialised", uninitialised, 1, kBlock, 256)
  LAK_KERNEL("uninitialised_registers", uninitialised_registers, 1, kBlock, 0)
  LAK_KERNEL("stride_1", strided<1>, 1, 32, 4096)
  LAK_KERNEL("stride_8", strided<8>, 1, 32, 4096)
  LAK_KERNEL("many_threads", many_threads, 2, 1024, 0)
  LAK_KERNEL("matrix_round_trip", matrix_round_trip, 1, 32, 1024)
#undef LAK_KERNEL
  throw std::invalid_argument("no kernel is called " + name);
}

}  // namespace emulator
