// Which products a problem gets.
#pragma once

#include "amx_products.h"

namespace lak::cpu::LAK_ISA {

// Calls f with the products for a problem.
template <class F>
auto with_products([[maybe_unused]] const ZeroGateParams& params, const F& f) {
#if LAK_HAS_TILES
  return f(TileProducts{});  // kernel_table.h lets no other problem come here
#else
  return with_storage_type(params.dtype, [&](auto type) {
    using T = decltype(type);
#if LAK_HAS_PAIRS
    if constexpr (std::is_same_v<T, BFloat16>) {
      if (params.head_dim % 2 == 0) return f(PairProducts{});
    }
#endif
    return f(FloatProducts<T>{});
  });
#endif
}

}  // namespace lak::cpu::LAK_ISA
