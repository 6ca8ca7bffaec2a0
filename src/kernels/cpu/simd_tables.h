// The row kernels of every instruction set that this machine has.
#pragma once

#include <utility>
#include <vector>

#include "base/cpu_features.h"
#include "kernels/cpu/simd/simd.h"

namespace mm {

inline std::vector<std::pair<Isa, const SimdTable*>> simd_tables() {
  std::vector<std::pair<Isa, const SimdTable*>> v;
  for (const Isa isa : available_isas()) {
    if (isa == Isa::scalar) v.emplace_back(isa, &scalar::table);
#ifdef MM_X86
    if (isa == Isa::avx2) v.emplace_back(isa, &avx2::table);
    if (isa == Isa::avx512) v.emplace_back(isa, &avx512::table);
#endif
  }
  return v;
}

}  // namespace mm
