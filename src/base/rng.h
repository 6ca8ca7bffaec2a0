// Counter-based random numbers (Philox4x32-10, Salmon et al., SC'11): value i of a stream depends on (seed, stream, i)
// alone, so results do not depend on threads, order, batch layout or device.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>

namespace mm {

inline std::array<uint32_t, 4> philox4x32(uint64_t seed, uint64_t stream, uint64_t counter) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32);
  uint32_t c2 = static_cast<uint32_t>(stream), c3 = static_cast<uint32_t>(stream >> 32);
  for (int round = 0; round < 10; round++) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0, n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

inline float to_unit_float(uint32_t x) { return static_cast<float>(x >> 8) * 0x1p-24f; }  // [0, 1)

// A sequential reader of one stream: 16 bytes of state, saved in checkpoints as (seed, stream, counter).
struct Rng {
  uint64_t seed = 0, stream = 0, counter = 0;
  uint32_t next_u32() { return philox4x32(seed, stream, counter++)[0]; }
  uint64_t next_u64() {
    const auto r = philox4x32(seed, stream, counter++);
    return uint64_t{r[0]} << 32 | r[1];
  }
  float uniform() { return to_unit_float(next_u32()); }
  // Integer in [0, n), n > 0 (multiply-shift; bias below n / 2^64).
  uint64_t below(uint64_t n) { return static_cast<uint64_t>((static_cast<unsigned __int128>(next_u64()) * n) >> 64); }
};

// Standard normal value i of a stream (Box-Muller on one Philox block).
inline float philox_normal(uint64_t seed, uint64_t stream, uint64_t i) {
  const auto r = philox4x32(seed, stream, i);
  const float u1 = 1.0f - to_unit_float(r[0]), u2 = to_unit_float(r[1]);
  return std::sqrt(-2.0f * std::log(u1)) * std::cos(6.283185307179586f * u2);
}

}  // namespace mm
