// Which products a problem gets.
#pragma once

#include "amx_products.h"

namespace lak::cpu::LAK_ISA {

// Calls f with the products for a problem.
template <class F>
auto with_products([[maybe_unused]] const ZeroGateParams& params, const F& f) {
#if LAK_HAS_TILES
  return f(TileProducts{});  // dispatch.cpp lets no other problem come here
#elif LAK_HAS_PAIRS
  return f(PairProducts{});  // likewise
#else
  return with_storage_type(params.dtype, [&](auto type) { return f(FloatProducts<decltype(type)>{}); });
#endif
}

}  // namespace lak::cpu::LAK_ISA
