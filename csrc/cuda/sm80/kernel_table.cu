// What is compiled, for `llama-adapter info` and the tests of the machine code.
#include "sm80/kernel_table.h"

#include "sm80/backward/keys.h"
#include "sm80/backward/rows.h"
#include "sm80/backward/words.h"
#include "sm80/decode/decode.h"
#include "sm80/forward.h"

namespace lak::sm80 {
namespace {

template <class T, int kHeadDim>
void add_kernels(std::string& lines, const char* type) {
  constexpr bool kTuned = kIsTuned<T, kHeadDim>;
  constexpr int kBlocks = kTuned ? 2 : 1;
  const auto line = [&](const char* kernel, int rows, int keys, int threads, int blocks, int bytes) {
    lines += std::string("sm80 ") + kernel + " " + type;
    for (int number : {kHeadDim, rows, keys, threads, blocks, bytes}) lines += " " + std::to_string(number);
    lines += "\n";
  };
  const auto forward = [&]<ForwardKind kKind>(const char* kernel) {
    using Memory = ForwardMemory<T, kHeadDim, kKind>;
    line(kernel, Memory::Tiles::kRows, Memory::Tiles::kKeys, kThreads, kBlocks, Memory::kBytes);
  };
  const auto pairs = [&]<class Tiles, class Memory>(const char* kernel, int blocks) {
    line(kernel, Tiles::kRows, Tiles::kKeys, Tiles::kThreads, blocks, Memory::kBytes);
  };
  if constexpr (kTuned) forward.template operator()<ForwardKind::kPlain>("forward");
  if constexpr (kTuned && kHeadDim == 128) forward.template operator()<ForwardKind::kSmall>("forward_small");
  forward.template operator()<ForwardKind::kElementwise>("forward_masked");
  line("backward_rows", RowTiles<T, kHeadDim>::kRows, kPrefixTile, kThreads, kBlocks, RowMemory<T, kHeadDim>::kBytes);
  using Wide = WordTiles<T, kHeadDim, 8>;
  using Small = WordTiles<T, kHeadDim, kWarps>;
  pairs.template operator()<Small, WordsMemory<T, kHeadDim>>("backward_words", kBlocks);
  if constexpr (kTuned) {
    pairs.template operator()<Wide, PairMemory<T, kHeadDim, Wide>>("backward_keys", 1);
    pairs.template operator()<Small, PairMemory<T, kHeadDim, Small>>("backward_keys_small", kBlocks);
  }
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
