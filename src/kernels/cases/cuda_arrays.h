// What the tests of single CUDA kernels share: arrays on the GPU, elements of every type, comparison with doubles.
#pragma once

#ifdef MM_CUDA
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "base/rng.h"
#include "kernels/cuda/session.h"
#include "tensor/dtype.h"
#include "tensor/memory.h"

namespace mm::cases {

inline constexpr DType f32 = DType::f32, bf16 = DType::bf16, f16 = DType::f16;
inline constexpr float kInf = std::numeric_limits<float>::infinity(), kNan = std::numeric_limits<float>::quiet_NaN();
inline constexpr DType types[] = {f32, bf16, f16};

inline const cuda::Context& context() {
  static cuda::Session session;
  return session.ctx;
}

// An array on the GPU. Copies wait.
template <class T>
class Device {
 public:
  explicit Device(const std::vector<T>& host) : n_(host.size()) {
    p_ = static_cast<T*>(allocate(std::max<size_t>(bytes(), 16), Memory::cuda));
    synchronize(nullptr);
    set(host);
  }
  ~Device() { release(p_, std::max<size_t>(bytes(), 16), Memory::cuda); }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
  T* pointer() const { return p_; }
  operator T*() const { return p_; }  // NOLINT(google-explicit-constructor)
  void set(const std::vector<T>& host) {
    if (n_ > 0) copy_async(p_, host.data(), bytes(), context().stream);
    synchronize(context().stream);
  }
  std::vector<T> get() const {
    std::vector<T> host(n_);
    if (n_ > 0) copy_async(host.data(), p_, bytes(), context().stream);
    synchronize(context().stream);
    return host;
  }

 private:
  size_t bytes() const { return n_ * sizeof(T); }
  size_t n_;
  T* p_;
};
using Bytes = std::vector<unsigned char>;

// Floats as elements of type t, and back.
inline Bytes encode(DType t, const std::vector<float>& x) {
  Bytes out(x.size() * dtype_size(t));
  for (size_t i = 0; i < x.size(); i++) {
    const uint16_t h = t == bf16 ? float_to_bf16(x[i]) : float_to_f16(x[i]);
    if (t == f32) std::memcpy(&out[4 * i], &x[i], 4);
    else std::memcpy(&out[2 * i], &h, 2);
  }
  return out;
}
inline std::vector<float> decode(DType t, const Bytes& b) {
  std::vector<float> x(b.size() / dtype_size(t));
  for (size_t i = 0; i < x.size(); i++) {
    uint16_t h = 0;
    if (t == f32) std::memcpy(&x[i], &b[4 * i], 4);
    else std::memcpy(&h, &b[2 * i], 2), x[i] = t == bf16 ? bf16_to_float(h) : f16_to_float(h);
  }
  return x;
}
inline std::vector<float> rounded(DType t, const std::vector<float>& x) { return decode(t, encode(t, x)); }
// Normal numbers; of a table, because tests ask for many.
inline std::vector<float> normal(size_t n, uint64_t stream, float scale = 1.0f) {
  static const std::vector<float> table = [] {
    std::vector<float> t(1'000'003);
    for (size_t i = 0; i < t.size(); i++) t[i] = philox_normal(7, 1, i);
    return t;
  }();
  std::vector<float> x(n);
  for (size_t i = 0; i < n; i++) x[i] = scale * table[(stream * 77'777 + i) % table.size()];
  return x;
}
inline double unit_of(DType t) { return t == f32 ? 1e-6 : t == bf16 ? 4e-3 : 5e-4; }  // largest error of one rounding

// |got - want| <= tolerance * (|want| + scale), and NaN exactly where NaN is wanted.
inline void expect_close(const std::string& what, const std::vector<float>& got, const std::vector<double>& want,
                         double tolerance, double scale) {
  ASSERT_EQ(got.size(), want.size()) << what;
  double worst = 0;
  size_t at = 0;
  for (size_t i = 0; i < got.size(); i++) {
    const auto g = static_cast<double>(got[i]);
    double error = std::abs(g - want[i]) / (std::abs(want[i]) + scale);
    if (std::isnan(g) != std::isnan(want[i])) error = 1e30;
    else if (std::isnan(g)) error = 0;
    if (!(error <= worst)) worst = error, at = i;
  }
  EXPECT_LE(worst, tolerance) << what << ": worst at " << at << ": got " << got[at] << ", want " << want[at];
}

class CudaTest : public testing::Test {
 protected:
  void SetUp() override {
    if (!cuda_status().usable) GTEST_SKIP() << "NOT TESTED: " << cuda_status().why_not;
  }
};

}  // namespace mm::cases
#endif
