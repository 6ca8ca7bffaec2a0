#include "kernels/cases/check_op.h"
#include "kernels/cases/row_cases.h"
#include "kernels/cpu/simd_tables.h"
#include "kernels/ref/ref_ops.h"

namespace mm {

using cases::added_output, cases::check_op, cases::Input, cases::Output, cases::rounding, cases::VectorCase;

using AdamW = cases::KernelTest;

namespace {

Output second_moment(int64_t n, double floor) {
  Output v = added_output("v", n, 3, floor);
  for (float& x : v.init) x *= x;
  return v;
}

// torch.optim.AdamW's documented algorithm, one element, in double.
struct Torch {
  double p, m = 0, v = 0;
  void step(double g, const AdamWArgs& a, int64_t t) {
    p -= a.lr * a.weight_decay * p;
    m = a.beta1 * m + (1 - a.beta1) * g;
    v = a.beta2 * v + (1 - a.beta2) * g * g;
    const double m_hat = m / (1 - std::pow(a.beta1, t)), v_hat = v / (1 - std::pow(a.beta2, t));
    p -= a.lr * m_hat / (std::sqrt(v_hat) + a.eps);
  }
};

}  // namespace

TEST_F(AdamW, OneStep) {
  for (const VectorCase& c : cases::vector_cases) {
    for (const int64_t step : {int64_t{1}, int64_t{1000}}) {
      const AdamWArgs a{.lr = 0.01, .beta2 = 0.95, .weight_decay = 0.1, .grad_scale = 0.25f, .step = step};
      const Input g(c.n, 4, c.offset);
      check_op(
          c.name(), c.offset,
          {added_output("p", c.n, 1, rounding(4)), added_output("m", c.n, 2, rounding(4)),
           second_moment(c.n, rounding(8))},
          [&]<class T>(T** out) { ref::adamw<T, T>(out[0], g.get<T>(), out[1], out[2], a, c.n); },
          [&](const KernelTable& k, float** out) { k.adamw(out[0], g.f(), out[1], out[2], a, c.n); });
    }
  }
}

// 200 steps from zero moments: tiny, zero and large gradients, float state against double.
TEST_F(AdamW, IsTorchs) {
  const int64_t n = 67;
  const Input start(n, 1), scale(n, 2);
  for (const KernelTable* k : {&cpu_kernels(), &ref_kernels()}) {
    std::vector<float> p(start.f(), start.f() + n), g(p.size()), m(p.size()), v(p.size());
    std::vector<Torch> torch;
    for (const float x : p) torch.push_back({.p = x});
    AdamWArgs a{.lr = 1e-3, .beta2 = 0.999, .eps = 1e-8, .weight_decay = 0.1, .grad_scale = 0.5f};
    for (a.step = 1; a.step <= 200; a.step++) {
      const Input noise(n, 100 + static_cast<uint64_t>(a.step));
      for (size_t i = 0; i < p.size(); i++) {
        const float size = i % 5 == 0 ? 0.0f : std::pow(10.0f, 3 * scale.f()[i] - 3);
        g[i] = size * (noise.f()[i] + 0.3f);
        torch[i].step(static_cast<double>(g[i]) * a.grad_scale, a, a.step);
      }
      k->adamw(p.data(), g.data(), m.data(), v.data(), a, n);
    }
    for (size_t i = 0; i < p.size(); i++) {
      // Each step rounds p once (half_ulp of about 1); the updates' own relative errors are far smaller.
      EXPECT_NEAR(p[i], torch[i].p, 200 * cases::half_ulp * (1 + std::abs(torch[i].p))) << i;
      EXPECT_NEAR(m[i], torch[i].m, 1e-5 * std::sqrt(torch[i].v)) << i;
      EXPECT_NEAR(v[i], torch[i].v, 1e-4 * torch[i].v) << i;  // 200 roundings, up to 2e-5
    }
  }
}

TEST(SimdAdamW, OneStep) {
  const AdamWStep a{.keep = 0.999f,
                    .step_size = 0.02f,
                    .beta1 = 0.9f,
                    .one_minus_beta1 = 0.1f,
                    .beta2 = 0.95f,
                    .one_minus_beta2 = 0.05f,
                    .inv_sqrt_correction2 = 2.0f,
                    .eps = 1e-6f,
                    .grad_scale = 0.5f};
  for (const auto& [isa, simd] : simd_tables()) {
    for (const int64_t n : {0, 1, 7, 16, 17, 33, 257}) {
      const Input g(n, 4, 1);
      check_op(
          fmt::format("n{}", n), 1,
          {added_output("p", n, 1, rounding(4)), added_output("m", n, 2, rounding(4)), second_moment(n, rounding(8))},
          [&]<class T>(T** out) {
            for (int64_t i = 0; i < n; i++) {
              const T gi = g.get<T>()[i] * a.grad_scale;
              T &p = out[0][i], &m = out[1][i], &v = out[2][i];
              m = a.beta1 * m + a.one_minus_beta1 * gi;
              v = a.beta2 * v + a.one_minus_beta2 * gi * gi;
              p = a.keep * p - a.step_size * m / (std::sqrt(v) * a.inv_sqrt_correction2 + a.eps);
            }
          },
          [&, &table = *simd](const KernelTable&, float** out) { table.adamw(out[0], g.f(), out[1], out[2], a, n); },
          cases::Bits::any, {{isa_name(isa), ref_kernels(), 1}});
    }
  }
}

}  // namespace mm
