// What is compiled, for `llama-adapter info` and the tests of the machine code.
#include "sm80/kernel_table.h"

#include "sm80/backward/keys.h"
#include "sm80/backward/prefix.h"
#include "sm80/backward/queries.h"
#include "sm80/backward/rows.h"
#include "sm80/decode/decode.h"
#include "sm80/forward.h"

namespace lak::sm80 {
namespace {

template <class T, int kHeadDim>
void add_kernels(std::string& lines, const char* type) {
  constexpr bool kTuned = kIsTuned<T, kHeadDim>;
  constexpr int kBlocks = kTuned ? 2 : 1, kBackwardThreads = 32 * kBackwardWarps<T, kHeadDim>;
  const auto line = [&](const char* kernel, int rows, int keys, int threads, int blocks, int bytes) {
    lines += std::string("sm80 ") + kernel + " " + type;
    for (int number : {kHeadDim, rows, keys, threads, blocks, bytes}) lines += " " + std::to_string(number);
    lines += "\n";
  };
  if constexpr (kTuned) {
    using Plain = ForwardMemory<T, kHeadDim, false>;
    line("forward", Plain::Tiles::kRows, Plain::Tiles::kKeys, kThreads, kBlocks, Plain::kBytes);
  }
  using Masked = ForwardMemory<T, kHeadDim, true>;
  line("forward_masked", Masked::Tiles::kRows, Masked::Tiles::kKeys, kThreads, kBlocks, Masked::kBytes);
  using Keys = KeyGradientTiles<T, kHeadDim>;
  if constexpr (kTuned) {
    line("backward_keys_dquery", Keys::kRows, Keys::kKeys, kBackwardThreads, kBlocks,
         KeyGradientMemory<T, kHeadDim, true>::kBytes);
    line("backward_keys", Keys::kRows, Keys::kKeys, kBackwardThreads, kBlocks, KeyGradientMemory<T, kHeadDim, false>::kBytes);
  }
  line("backward_keys_masked", Keys::kRows, Keys::kKeys, kBackwardThreads, kBlocks,
       KeyGradientMemory<T, kHeadDim, false>::kBytes);
  using Queries = QueryGradientTiles<T, kHeadDim>;
  if constexpr (kTuned) {
    line("backward_queries", Queries::kRows, Queries::kKeys, kBackwardThreads, kBlocks, kQueryGradientBytes<T, kHeadDim>);
  }
  line("backward_queries_masked", Queries::kRows, Queries::kKeys, kBackwardThreads, kBlocks, kQueryGradientBytes<T, kHeadDim>);
  line("backward_rows", 16 * kBackwardWarps<T, kHeadDim>, kPrefixTile, kBackwardThreads, 1, kRowsKernelBytes<T, kHeadDim>);
  line("backward_prefix", kPrefixRowsPerBlock, kPrefixTile, kBackwardThreads, 1, kPrefixKernelBytes<T, kHeadDim>);
  constexpr int kDecodeWarpsHere = kDecodeWarps<T, kHeadDim>;
  line("decode", kDecodeRows, kDecodeWarpsHere * kDecodeKeys, 32 * kDecodeWarpsHere, 1, DecodeMemory<T, kHeadDim>::kBytes);
}

template <class T>
void add_head_dims(std::string& lines, const char* type) {
  add_kernels<T, 64>(lines, type);
  add_kernels<T, 128>(lines, type);
  add_kernels<T, 256>(lines, type);
}

}  // namespace

void list_kernels(std::string& lines) {
  add_head_dims<BFloat16>(lines, "bfloat16");
  add_head_dims<Float16>(lines, "float16");
  add_head_dims<float>(lines, "float32");
}

}  // namespace lak::sm80
