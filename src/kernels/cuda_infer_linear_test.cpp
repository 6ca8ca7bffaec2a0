// The CUDA products of inference against plain references in double: int8 weights, few tokens, wide steps.
#ifdef MM_CUDA
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "kernels/cases/cuda_arrays.h"
#include "kernels/cuda/infer_kernels.h"

namespace mm {
namespace {

using namespace cases;  // NOLINT(google-build-using-namespace)

using CudaInfer = CudaTest;

// --- int8 weights -------------------------------------------------------------------------------------------------
struct Quantized {
  std::vector<int8_t> data;
  std::vector<uint16_t> scales;
  std::vector<double> values;
};
Quantized quantize(const std::vector<float>& w) {
  Quantized q;
  for (size_t at = 0; at < w.size(); at += 32) {
    float top = 0;
    for (size_t i = 0; i < 32; i++) top = std::max(top, std::abs(w[at + i]));
    q.scales.push_back(float_to_f16(top / 127.0f));
    const float scale = f16_to_float(q.scales.back());
    for (size_t i = 0; i < 32; i++) {
      q.data.push_back(
          static_cast<int8_t>(scale > 0 ? std::clamp(std::nearbyint(w[at + i] / scale), -127.0f, 127.0f) : 0));
      q.values.push_back(static_cast<double>(q.data.back()) * static_cast<double>(scale));
    }
  }
  return q;
}

TEST_F(CudaInfer, I8Quantize) {
  constexpr int64_t n = 7, k = 96;
  std::vector<float> w = normal(n * k, 41, 0.05f);
  std::fill(w.begin() + 32, w.begin() + 64, 0.0f);
  w[64] = kNan;
  const Device<float> w_d(w);
  const Device<int8_t> data(std::vector<int8_t>(n * k, 3));
  const Device<uint16_t> scales(std::vector<uint16_t>(n * k / 32));
  cuda::quantize_i8(context(), data, scales, w_d, n, k);
  const std::vector<uint16_t> got_scales = scales.get();
  EXPECT_TRUE(std::isnan(f16_to_float(got_scales[2])));
  w[64] = 0;
  const Quantized want = quantize(w);
  const std::vector<int8_t> got = data.get();
  for (size_t i = 0; i < got.size(); i++) {
    if (i / 32 == 2) continue;
    ASSERT_EQ(got_scales[i / 32], want.scales[i / 32]) << i;
    ASSERT_EQ(got[i], want.data[i]) << i;
  }
}

void check_linear(DType t, int64_t m, int64_t n, int64_t k, bool residual) {
  const std::string what = std::string(dtype_name(t)) + " m " + std::to_string(m) + " n " + std::to_string(n) + " k " +
                           std::to_string(k) + (residual ? " +" : "");
  const Quantized q = quantize(normal(static_cast<size_t>(n * k), 42, 0.05f));
  std::vector<float> x = rounded(t, normal(static_cast<size_t>(m * k), 43));
  const int64_t nan_row = m > 2 ? 1 : -1;
  if (nan_row >= 0) x[static_cast<size_t>(nan_row * k + 5)] = kNan;
  const std::vector<float> y = rounded(t, normal(static_cast<size_t>(m * n), 44));
  std::vector<double> want(y.begin(), y.end()), want_rows;
  std::vector<float> got_rows;
  const Device<unsigned char> x_d(encode(t, x)), y_d(encode(t, y));
  const Device<int8_t> data(q.data);
  const Device<uint16_t> scales(q.scales);
  const void* add = residual ? y_d.pointer() : nullptr;
  cuda::linear_i8(context(), t, y_d, x_d, data, scales, add, m, n, k);
  const Bytes got_bytes = y_d.get();
  const std::vector<float> got = decode(t, got_bytes);
  for (int64_t r = 0; r < m; r++) {  // all rows of small products, some of large ones
    if (m * n * k > 20'000'000 && r != 1 && r != m - 1 && r % 61 != 0) continue;
    for (int64_t c = 0; c < n; c++) {
      double s = residual ? static_cast<double>(y[static_cast<size_t>(r * n + c)]) : 0;
      for (int64_t i = 0; i < k; i++)
        s += static_cast<double>(x[static_cast<size_t>(r * k + i)]) * q.values[static_cast<size_t>(c * k + i)];
      want_rows.push_back(s), got_rows.push_back(got[static_cast<size_t>(r * n + c)]);
    }
  }
  expect_close(what, got_rows, want_rows, t == f32 ? 2e-6 : 1.1 * unit_of(t),
               t == f32 || m * n > 2000 ? 1 : 0.02);  // the weights of large products may be rounded to T
  if (residual) return;
  cuda::linear_i8(context(), t, y_d, x_d, data, scales, nullptr, m, n, k);
  EXPECT_TRUE(y_d.get() == got_bytes) << what << ": the bits differ from run to run";
}

TEST_F(CudaInfer, I8Linear) {
  for (const DType t : types) {
    for (const int64_t m : {1, 2, 7, 8, 9, 16, 17, 33, 64, 65, 96, 97, 128, 129, 300}) {
      check_linear(t, m, 50, 96, m % 2 == 0);
      check_linear(t, m, 16, 32, m % 2 == 1);
    }
    for (const int64_t m : {1, 12, 30, 60, 96, 128, 200}) check_linear(t, m, 4100, 288, false);
    check_linear(t, 96, 768, 2432, true);
    check_linear(t, 1, 6400, 768, false);
  }
}

// --- few tokens --------------------------------------------------------------------------------------------------
struct FewCase {
  DType t;
  bool int8, norm, residual, swiglu;
  int64_t m, n, k;
};

std::string name_of(const FewCase& c) {
  return std::string(dtype_name(c.t)) + (c.int8 ? " int8" : "") + (c.norm ? " norm" : "") +
         (c.residual ? " residual" : "") + (c.swiglu ? " swiglu" : "") + " m " + std::to_string(c.m) + " n " +
         std::to_string(c.n) + " k " + std::to_string(c.k);
}

// Against sums in double; of large products some rows.
void expect_few(const std::string& what, const FewCase& c, const std::vector<float>& w, const std::vector<float>& norm,
                const std::vector<float>& x, const std::vector<float>& y, const std::vector<double>& i8,
                const std::vector<float>& got) {
  const int64_t n_out = c.swiglu ? c.n / 2 : c.n;
  std::vector<double> want;
  std::vector<float> some;
  for (int64_t r = 0; r < c.m; r++) {
    if (c.m * c.n * c.k > 4'000'000 && r % 37 != 5 && r != c.m - 1) continue;
    const float* from = &x[static_cast<size_t>(r * c.k)];
    double squares = 0;
    for (int64_t i = 0; i < c.k; i++) squares += static_cast<double>(from[i]) * static_cast<double>(from[i]);
    const double rms = std::sqrt(squares / static_cast<double>(c.k) + 1e-6);
    const auto product = [&](int64_t row) {
      double s = 0;
      for (int64_t i = 0; i < c.k; i++) {
        const auto at = static_cast<size_t>(row * c.k + i);
        const double v = c.int8 ? i8[at] : static_cast<double>(w[at]);
        s +=
            v * static_cast<double>(from[i]) * (c.norm ? static_cast<double>(norm[static_cast<size_t>(i)]) / rms : 1.0);
      }
      return s;
    };
    for (int64_t i = 0; i < n_out; i++) {
      double v = product(i);
      if (c.swiglu) v = v / (1 + std::exp(-v)) * product(i + n_out);
      if (c.residual) v += static_cast<double>(y[static_cast<size_t>(r * n_out + i)]);
      want.push_back(v), some.push_back(got[static_cast<size_t>(r * n_out + i)]);
    }
  }
  // With a norm, each weight times the norm's weight is rounded once: errors of k such terms.
  const double terms = c.norm ? std::sqrt(static_cast<double>(c.k)) * 0.07 : 0.02;
  expect_close(what, some, want, (c.swiglu ? 6 : 2) * unit_of(c.t), std::max(terms, 0.02));
}

void check_few(const FewCase& c) {
  const std::string what = name_of(c);
  const std::vector<float> w = rounded(c.t, normal(static_cast<size_t>(c.n * c.k), 51, 0.05f)),
                           norm = rounded(c.t, normal(static_cast<size_t>(c.k), 53)),
                           x = rounded(c.t, normal(static_cast<size_t>(c.m * c.k), 52));
  const Quantized q = quantize(w);
  const int64_t n_out = c.swiglu ? c.n / 2 : c.n;
  const std::vector<float> y = rounded(c.t, normal(static_cast<size_t>(c.m * n_out), 54));
  const Device<unsigned char> x_d(encode(c.t, x)), y_d(encode(c.t, y)), w_d(encode(c.t, w)), norm_d(encode(c.t, norm));
  const Device<int8_t> data(q.data);
  const Device<uint16_t> scales(q.scales);
  const cuda::FewLinear a = {.y = y_d,
                             .x = x_d,
                             .w = c.int8 ? static_cast<void*>(data.pointer()) : w_d.pointer(),
                             .scales = c.int8 ? scales.pointer() : nullptr,
                             .norm = c.norm ? norm_d.pointer() : nullptr,
                             .residual = c.residual ? y_d.pointer() : nullptr,
                             .swiglu = c.swiglu,
                             .m = c.m,
                             .n = c.n,
                             .k = c.k};
  ASSERT_TRUE(cuda::linear_few_fits(c.t, a)) << what;
  cuda::linear_few(context(), c.t, a);
  expect_few(what, c, w, norm, x, y, q.values, decode(c.t, y_d.get()));
}

TEST_F(CudaInfer, FewLinear) {
  for (const DType t : {bf16, f16}) {
    for (const bool int8 : {false, true}) {
      for (const int64_t m : {1, 7, 8, 9, 16, 17, 32, 33, 96, 100}) {
        check_few({t, int8, false, m % 2 == 0, false, m, 50, 96});
        check_few({t, int8, true, false, false, m, 48, 352});
        check_few({t, int8, true, false, true, m, 2 * 40, 288});
        check_few({t, int8, false, true, true, m, 2 * 39, 1024});
      }
      for (const int64_t m : {1, 16, 20, 96}) {
        check_few({t, int8, true, false, false, m, 6400, 768});
        check_few({t, int8, false, true, false, m, 768, 2432});
        check_few({t, int8, true, false, true, m, 4864, 768});
      }
    }
  }
}

// --- wide steps --------------------------------------------------------------------------------------------------
// Bytes on the device with a row's worth of sentinels for each token that a tile may reach behind the last.
struct Guarded {
  static constexpr unsigned char sentinel = 0x2a;
  size_t size;
  Device<unsigned char> device;
  Guarded(Bytes b, size_t behind) : size(b.size()), device((b.resize(size + behind, sentinel), b)) {}
  Bytes get(const std::string& what) const {
    Bytes b = device.get();
    EXPECT_TRUE(
        std::all_of(b.begin() + static_cast<std::ptrdiff_t>(size), b.end(), [](auto v) { return v == sentinel; }))
        << what << ": wrote behind the last row";
    b.resize(size);
    return b;
  }
};

// scaled = x * norm, rounded once, and squares [d / 64, m], of rows x [m, d].
void expect_scaled(const std::string& what, int64_t m, int64_t d, const std::vector<float>& x,
                   const std::vector<float>& norm, const Bytes& scaled, const Bytes& squares) {
  std::vector<float> product(x.size()), sums(static_cast<size_t>(m * d / 64));
  std::vector<double> want(sums.size());
  for (int64_t i = 0; i < m * d; i++) {
    const auto at = static_cast<size_t>(i);
    product[at] = x[at] * norm[static_cast<size_t>(i % d)];
    want[static_cast<size_t>(i % d / 64 * m + i / d)] += static_cast<double>(x[at]) * static_cast<double>(x[at]);
  }
  EXPECT_TRUE(encode(bf16, product) == scaled) << what << ": scaled";
  std::memcpy(sums.data(), squares.data(), sums.size() * sizeof(float));
  expect_close(what + ": squares", sums, want, 2e-6, 1e-6);
}

void check_wide(const FewCase& c) {
  const std::string what = name_of(c);
  const auto count = [](int64_t rows, int64_t cols) { return static_cast<size_t>(rows * cols); };
  const int64_t n_out = c.swiglu ? c.n / 2 : c.n;
  const bool next = c.residual && n_out % 64 == 0;
  const std::vector<float> w = rounded(bf16, normal(count(c.n, c.k), 51, 0.05f)),
                           norm = rounded(bf16, normal(count(1, c.k), 53)),
                           next_norm = rounded(bf16, normal(count(1, n_out), 55)),
                           x = rounded(bf16, normal(count(c.m, c.k), 52)),
                           y = rounded(bf16, normal(count(c.m, n_out), 54));
  std::vector<int32_t> ids(static_cast<size_t>(c.m));
  std::iota(ids.begin(), ids.end(), 0);
  const Device<int32_t> ids_d(ids);
  const Device<unsigned char> w_d(encode(bf16, w)), norm_d(encode(bf16, norm)), next_norm_d(encode(bf16, next_norm));
  struct Result {
    Bytes y, scaled, squares;
  };
  const auto run = [&](const std::vector<float>& from, Result& r) {
    const Device<unsigned char> x_d(encode(bf16, from)), copy(Bytes(count(c.m, c.k) * 2));
    const Guarded scaled_x(Bytes(count(c.m, c.k) * 2), count(1, c.k) * 2),
        squares_x(Bytes(count(c.m, c.k) / 64 * 4), 256), y_d(encode(bf16, y), count(64, n_out) * 2),
        scaled_y(Bytes(count(c.m, n_out) * 2), count(64, n_out) * 2),
        squares_y(Bytes(count(c.m, n_out) / 64 * 4), 1024);
    const auto floats = [](const Guarded& g) { return reinterpret_cast<float*>(g.device.pointer()); };
    if (c.norm) cuda::embed_scaled(context(), copy, {norm_d, scaled_x.device, floats(squares_x)}, x_d, ids_d, c.m, c.k);
    cuda::FewLinear a = {.y = y_d.device,
                         .x = c.norm ? scaled_x.device.pointer() : x_d.pointer(),
                         .w = w_d,
                         .residual = c.residual ? y_d.device.pointer() : nullptr,
                         .swiglu = c.swiglu,
                         .m = c.m,
                         .n = c.n,
                         .k = c.k,
                         .squares = c.norm ? floats(squares_x) : nullptr};
    if (next) a.next = {next_norm_d, scaled_y.device, floats(squares_y)};
    ASSERT_TRUE(cuda::linear_wide_fits(context(), bf16, a)) << what;
    cuda::linear_wide(context(), bf16, a);
    if (c.norm) {
      EXPECT_TRUE(copy.get() == encode(bf16, from)) << what << ": rows of the table";
      const Bytes scaled = scaled_x.get(what), squares = squares_x.get(what);
      if (&from == &x) expect_scaled(what + ", embedding", c.m, c.k, from, norm, scaled, squares);
    }
    r = {y_d.get(what), scaled_y.get(what), squares_y.get(what)};
  };
  Result all, again;
  run(x, all);
  if (testing::Test::HasFatalFailure()) return;
  const std::vector<float> got = decode(bf16, all.y);
  expect_few(what, c, w, norm, x, y, {}, got);
  if (next) expect_scaled(what + ", y", c.m, n_out, got, next_norm, all.scaled, all.squares);
  run(x, again);
  EXPECT_TRUE(all.y == again.y && all.scaled == again.scaled && all.squares == again.squares)
      << what << ": the bits differ from run to run";
  // A row among others: its bits do not depend on them.
  const int64_t row = c.m * 2 / 3;
  std::vector<float> others(x.size(), std::nanf(""));
  std::copy_n(x.begin() + row * c.k, c.k, others.begin() + row * c.k);
  run(others, again);
  EXPECT_TRUE(std::equal(all.y.begin() + row * n_out * 2, all.y.begin() + (row + 1) * n_out * 2,
                         again.y.begin() + row * n_out * 2))
      << what << ": a row depends on the others";
}

TEST_F(CudaInfer, WideLinear) {
  if (context().arch != 90) GTEST_SKIP() << "NOT TESTED: no Hopper";
  for (const int64_t m : {1, 31, 33, 47, 48, 64, 65, 96, 97, 127, 128}) {
    check_wide({bf16, false, false, m % 2 == 0, false, m, 52, 64});  // a half step of k, rows behind the last
    check_wide({bf16, false, true, true, false, m, 1000, 320});
    check_wide({bf16, false, true, false, true, m, 2 * 36, 192});
    check_wide({bf16, false, false, false, true, m, 2 * 132, 704});
    check_wide({bf16, false, false, m % 2 == 1, false, m, 68, 2432});  // k split over a cluster
  }
  for (const int64_t m : {33, 47, 96, 128}) {  // of the 26M model
    check_wide({bf16, false, true, false, false, m, 1024, 512});
    check_wide({bf16, false, false, true, false, m, 512, 512});
    check_wide({bf16, false, true, false, true, m, 2816, 512});
    check_wide({bf16, false, false, true, false, m, 512, 1408});
  }
  for (const int64_t m : {33, 47, 64, 96, 128}) {  // of the 64M model
    check_wide({bf16, false, true, false, false, m, 1536, 768});
    check_wide({bf16, false, false, true, false, m, 768, 768});
    check_wide({bf16, false, true, false, true, m, 4864, 768});
    check_wide({bf16, false, false, true, false, m, 768, 2432});
    check_wide({bf16, false, true, false, false, m, 6400, 768});
  }
}

TEST_F(CudaInfer, WideLinearTakes) {
  alignas(16) static unsigned char at[32];
  cuda::FewLinear a = {.y = at, .x = at, .w = at, .m = 96, .n = 768, .k = 768};
  if (context().arch != 90) {
    EXPECT_FALSE(cuda::linear_wide_fits(context(), bf16, a));
    return;
  }
  EXPECT_TRUE(cuda::linear_wide_fits(context(), bf16, a));
  EXPECT_FALSE(cuda::linear_wide_fits(context(), f16, a));
  EXPECT_FALSE(cuda::linear_wide_fits(context(), f32, a));
  const auto refused = [&](auto change) {
    cuda::FewLinear b = a;
    change(b);
    EXPECT_FALSE(cuda::linear_wide_fits(context(), bf16, b)) << b.m << " " << b.n << " " << b.k;
  };
  refused([](auto& b) { b.m = 129; });
  refused([](auto& b) { b.n = 770; });
  refused([](auto& b) { b.k = 768 + 32; });
  refused([](auto& b) { b.x = at + 8; });
  refused([](auto& b) { b.n = 1 << 19; });
  refused([](auto& b) { b.scales = at; });
  refused([](auto& b) { b.norm = at; });
}

}  // namespace
}  // namespace mm
#endif
