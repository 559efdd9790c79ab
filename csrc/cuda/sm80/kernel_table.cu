// What is compiled, for `llama-adapter info` and the tests of the machine code.
#include <string>

#include "interface.h"
#include "sm80/backward/keys.h"
#include "sm80/backward/prefix.h"
#include "sm80/backward/queries.h"
#include "sm80/backward/rows.h"
#include "sm80/decode/combine.h"
#include "sm80/forward.h"

namespace {

using namespace lak;

void add(std::string& table, const char* kernel, const char* type, int head_dim, int rows, int keys, int threads, int blocks,
         int bytes) {
  table += kernel;
  table += std::string(" ") + type;
  for (int number : {head_dim, rows, keys, threads, blocks, bytes}) table += " " + std::to_string(number);
  table += "\n";
}

template <class T, int kHeadDim>
void add_kernels(std::string& table, const char* type) {
  constexpr bool kTuned = kIsTuned<T, kHeadDim>;
  constexpr int kBlocks = kTuned ? 2 : 1, kBackwardThreads = 32 * kBackwardWarps<T, kHeadDim>;
  const auto line = [&](const char* kernel, int rows, int keys, int threads, int blocks, int bytes) {
    add(table, kernel, type, kHeadDim, rows, keys, threads, blocks, bytes);
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
void add_head_dims(std::string& table, const char* type) {
  add_kernels<T, 64>(table, type);
  add_kernels<T, 128>(table, type);
  add_kernels<T, 256>(table, type);
}

}  // namespace

extern "C" {

const char* lak_cuda_kernels() {
  static const std::string table = [] {
    std::string lines;
    add_head_dims<BFloat16>(lines, "bfloat16");
    add_head_dims<Float16>(lines, "float16");
    add_head_dims<float>(lines, "float32");
    return lines;
  }();
  return table.c_str();
}

const char* lak_cuda_architectures() { return LAK_CUDA_ARCHITECTURES; }
}
