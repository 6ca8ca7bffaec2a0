// Shapes of rmsnorm and qk_norm_rope, forward and backward.
#pragma once

#include <fmt/format.h>

#include <cmath>
#include <cstdint>
#include <string>

#include "kernels/cases/tolerance.h"

namespace mm::cases {

struct RmsnormCase {
  int64_t n, d;
  int offset = 0;
  float scale = 1.0f;  // of x; 1e-3 makes eps count
  std::string name() const { return fmt::format("n{} d{} offset{} scale{}", n, d, offset, scale); }
  double floor_y() const { return rounding(4); }  // |x rstd w| is below 4 for most of N(0, 1) times N(0, 1)
  double floor_rstd() const { return rounding(1 / static_cast<double>(scale)); }
  double floor_dx() const { return rounding(4 / static_cast<double>(scale)); }
  double floor_dw() const { return rounding(4 * std::sqrt(static_cast<double>(n)) + 1); }
};

inline const RmsnormCase rmsnorm_cases[] = {
    {0, 8},
    {1, 1},
    {1, 768},
    {2, 17, 1},
    {3, 31},
    {7, 96, 1},
    {13, 127},
    {31, 64, 1},
    {33, 65, 0},
    {64, 256},
    {65, 511, 1},
    {129, 33},
    {131, 512, 1},
    {523, 48},
    {600, 7, 1},
    {64, 768},
    {9, 512, 0, 1e-3f},
    {40, 100, 1, 1e-3f},
    {21, 64, 0, 30.0f},
};

struct NormRopeCase {
  int64_t n;
  int n_head, n_kv_head, d_head;
  bool norm = true;    // false: rotation only (Llama style)
  bool slots = false;  // k and v go to rows of a larger cache, in another order
  int64_t pad = 0;     // between rows of k and of v
  int offset = 0;
  std::string name() const {
    return fmt::format("n{} heads{}/{} d{} norm{} slots{} pad{} offset{}", n, n_head, n_kv_head, d_head, norm, slots,
                       pad, offset);
  }
  double floor_y() const { return rounding(4); }
  double floor_dx() const { return rounding(4); }
  double floor_dw() const { return rounding(4 * std::sqrt(static_cast<double>(n) * n_head) + 1); }
};

inline const NormRopeCase norm_rope_cases[] = {
    {0, 2, 1, 32},
    {1, 1, 1, 2},
    {1, 8, 2, 64, true, true},
    {3, 4, 4, 32, true, false, 5, 1},
    {7, 8, 2, 64},
    {7, 8, 2, 64, false},
    {13, 8, 4, 96, true, true, 32, 1},
    {13, 3, 1, 6, false, true, 1, 1},
    {17, 4, 1, 128, true, false, 0, 1},
    {33, 2, 2, 34, true, true},
    {67, 8, 4, 96},
    {131, 6, 3, 64, true, true, 64},
    {521, 2, 1, 32},
};

}  // namespace mm::cases
