// Shapes of linear_fwd and linear_bwd: y [m, n] = x [m, k] w [n, k]^T.
#pragma once

#include <fmt/format.h>

#include <cmath>
#include <cstdint>
#include <string>

#include "kernels/cases/tolerance.h"

namespace mm::cases {

struct LinearCase {
  int64_t m, n, k;
  int64_t pad = 0;  // elements between the end of a row of x, y, dx, dy and the next
  int offset = 0;   // every pointer lies this many floats past an aligned address
  std::string name() const { return fmt::format("m{} n{} k{} pad{} offset{}", m, n, k, pad, offset); }
  // Inputs are N(0, 1), so sums over k, n and m terms have about the size of the root.
  double floor_y() const { return rounding(std::sqrt(static_cast<double>(k))); }
  double floor_dx() const { return rounding(std::sqrt(static_cast<double>(n))); }
  double floor_dw() const { return rounding(std::sqrt(static_cast<double>(m)) + 1); }
};

inline const LinearCase linear_cases[] = {
    {0, 7, 5},
    {1, 1, 1},
    {1, 3, 17},
    {1, 67, 33, 0, 1},
    {2, 65, 31, 3},
    {3, 130, 97},
    {4, 257, 64, 5, 1},
    {5, 4, 3},
    {5, 97, 33, 3, 1},
    {7, 64, 64},
    {13, 1, 127},
    {31, 29, 1},
    {64, 65, 63, 0, 1},
    {65, 48, 96},
    {127, 131, 37, 1, 1},
    {129, 64, 128, 8},
    // 63 terms in dw, y and dx: the sum length that oneDNN 2.6 gets wrong in bf16
    {63, 112, 48},
    {23, 112, 63},
    {13, 63, 80, 1},
    // a decode step of MiniMind-3, then widths of MiniMind models
    {1, 2432, 768},
    {67, 512, 256},
    {64, 768, 512},
    {33, 256, 832},
};

}  // namespace mm::cases
