// The row kernels of every instruction set that this machine has: those without a driver of the same signature (the
// others run in the op tests as backend "rows/..."), and the accuracy of exp.
#include "kernels/cases/check_op.h"
#include "kernels/cases/norm_cases.h"
#include "kernels/cases/row_cases.h"
#include "kernels/cpu/simd_tables.h"
#include "kernels/ref/ref_ops.h"

namespace mm {

using cases::added_output, cases::Backend, cases::check_op, cases::Input, cases::rounding, cases::set_output;

namespace {

const int64_t sizes[] = {0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 257, 1000};

// The tests below run a row kernel through check_op with one backend: the instruction set of `simd`.
void check_rows(Isa isa, const std::string& name, int offset, const std::vector<cases::Output>& outputs, auto&& spec,
                auto&& run) {
  const std::vector<Backend> backend{{isa_name(isa), ref_kernels(), 1}};
  check_op(
      name, offset, outputs, spec, [&](const KernelTable&, float** out) { run(out); }, cases::Bits::any, backend);
}

}  // namespace

TEST(Simd, DotAxpyScale) {
  for (const auto& [isa, simd] : simd_tables()) {
    for (const int64_t n : sizes) {
      for (const int offset : {0, 1}) {
        const Input a(n, 1, offset), b(n, 2, offset);
        const double floor = rounding(std::sqrt(static_cast<double>(n)) + 4);
        check_rows(
            isa, fmt::format("n{} offset{}", n, offset), offset,
            {set_output("dot", 1, floor), added_output("axpy", n, 3, floor), added_output("scale", n, 4, floor)},
            [&]<class T>(T** out) {
              out[0][0] = 0;
              for (int64_t i = 0; i < n; i++) {
                out[0][0] += a.get<T>()[i] * b.get<T>()[i];
                out[1][i] += T{0.3f} * a.get<T>()[i];
                out[2][i] *= T{0.3f};
              }
            },
            [&, &table = *simd](float** out) {
              out[0][0] = table.dot(a.f(), b.f(), n);
              table.axpy(out[1], 0.3f, a.f(), n);
              table.scale(out[2], 0.3f, n);
            });
      }
    }
  }
}

TEST(Simd, Gemv) {
  for (const auto& [isa, simd] : simd_tables()) {
    for (const int64_t rows : {0, 1, 3, 4, 5, 17}) {
      for (const int64_t k : sizes) {
        const Input w(rows * k, 1, 1), x(k, 2, 1);
        const double floor = rounding(std::sqrt(static_cast<double>(k)) + 1);
        check_rows(
            isa, fmt::format("rows{} k{}", rows, k), 1,
            {set_output("y", rows, floor), added_output("y +=", rows, 3, floor)},
            [&]<class T>(T** out) {
              ref::linear_fwd<T, T>(out[0], rows, x.get<T>(), k, w.get<T>(), 1, rows, k, false, false);
              ref::linear_fwd<T, T>(out[1], rows, x.get<T>(), k, w.get<T>(), 1, rows, k, true, false);
            },
            [&, &table = *simd](float** out) {
              table.gemv(out[0], w.f(), x.f(), rows, k, false);
              table.gemv(out[1], w.f(), x.f(), rows, k, true);
            });
      }
    }
  }
}

// One head: rows lie apart, go to slots, and only the head's columns change.
TEST(Simd, NormRope) {
  const int64_t n = 11, ldx = 200;
  for (const auto& [isa, simd] : simd_tables()) {
    for (const int d : {2, 6, 32, 34, 64, 96, 128}) {
      for (const bool norm : {true, false}) {
        const Input x(n * ldx, 1, 1), w(d, 2, 1), cos(20 * d / 2, 3, 1), sin(20 * d / 2, 4, 1);
        std::vector<int32_t> positions;
        std::vector<int64_t> slots;
        for (int t = 0; t < n; t++) positions.push_back(t * 7 % 20), slots.push_back(2 * (n - 1 - t));
        const NormRopeArgs args{.cos = cos.f(), .sin = sin.f(), .positions = positions.data(), .d_head = d};
        check_rows(
            isa, fmt::format("d{} norm{}", d, norm), 1,
            {set_output("y", 2 * n * d, rounding(16)), added_output("dx", n * ldx, 5, rounding(16)),
             added_output("dw", d, 6, rounding(64))},
            [&]<class T>(T** out) {
              const T* weight = norm ? w.get<T>() : nullptr;
              for (int64_t t = 0; t < n; t++) {
                ref::norm_rope_head<T, T>(out[0] + slots[static_cast<size_t>(t)] * d, x.get<T>() + t * ldx, weight,
                                          args, t);
                NormRopeArgs row = args;  // the op's backward with one token of one head
                row.positions += t;
                row.n = 1, row.n_head = 1, row.n_kv_head = 0;
                ref::qk_norm_rope_bwd<T, T>(out[1] + t * ldx, out[2], nullptr, x.get<T>() + t * ldx, weight, nullptr,
                                            row);
              }
            },
            [&, &table = *simd](float** out) {
              const float* weight = norm ? w.f() : nullptr;
              table.norm_rope_fwd(out[0], d, slots.data(), x.f(), ldx, weight, cos.f(), sin.f(), positions.data(),
                                  args.eps, n, d);
              table.norm_rope_bwd(out[1], ldx, out[2], x.f(), ldx, weight, cos.f(), sin.f(), positions.data(), args.eps,
                                  n, d);
            });
      }
    }
  }
}

TEST(Simd, SoftmaxRowAndItsBackward) {
  for (const auto& [isa, simd] : simd_tables()) {
    for (const int64_t n : sizes) {
      for (const int64_t valid : {int64_t{1}, n / 2, n}) {
        if (valid == 0 || valid > n) continue;
        const Input s(n, 1, 1, 3.0f), dp(n, 2, 1);
        cases::Output p = set_output("p", n, rounding(1)), saved = set_output("p from lse", n, rounding(8)),
                      ds = set_output("ds", n, rounding(8));
        std::copy_n(s.f(), n, p.init.begin());
        saved.init = p.init;
        std::copy_n(dp.f(), n, ds.init.begin());
        check_rows(
            isa, fmt::format("{} of {}", valid, n), 1,
            {p, set_output("lse", 1, rounding(8)), set_output("inv_sum", 1, rounding(1)), saved, ds},
            [&]<class T>(T** out) {
              const T m = *std::max_element(s.get<T>(), s.get<T>() + valid);
              T sum = 0;
              for (int64_t i = 0; i < n; i++) sum += out[0][i] = i < valid ? std::exp(s.get<T>()[i] - m) : T{0};
              out[1][0] = m + std::log(sum);
              out[2][0] = T{1} / sum;
              for (int64_t i = 0; i < n; i++) {
                out[3][i] = i < valid ? std::exp(s.get<T>()[i] - out[1][0]) : T{0};
                out[4][i] = out[3][i] * (dp.get<T>()[i] - T{0.3f}) * T{0.5f};
              }
            },
            [&, &table = *simd](float** out) {
              table.softmax_row(out[0], valid, n, out[1], out[2]);
              table.softmax_row_bwd(out[3], out[4], *out[1], 0.3f, 0.5f, valid, n);
            });
      }
    }
  }
}

// exp as softmax_row shows it: the score 0 is the largest, so element i becomes exp(x[i]).
TEST(Simd, ExpOverItsWholeRange) {
  const int64_t n = 400001;
  for (const auto& [isa, simd] : simd_tables()) {
    std::vector<float> x(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; i++)
      x[static_cast<size_t>(i)] = -110.0f * static_cast<float>(i) / static_cast<float>(n - 1);
    const std::vector<float> at = x;
    float lse = 0, inv = 0;
    simd->softmax_row(x.data(), n, n, &lse, &inv);
    double worst = 0;
    for (size_t i = 0; i < x.size(); i++) {
      const double exact = std::exp(static_cast<double>(at[i]));
      if (at[i] >= -87.3f) worst = std::max(worst, std::abs(x[i] - exact) / exact);
      else ASSERT_NEAR(x[i], exact, 1.23e-38) << "exp(" << at[i] << ")";  // exp(-87.3), near the smallest normal
    }
    EXPECT_LE(worst, 2 * 0x1p-23) << isa_name(isa);  // 2 units in the last place
  }
}

TEST(Simd, ExpOfExtremes) {
  constexpr float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  for (const auto& [isa, simd] : simd_tables()) {
    for (const int64_t n : {2, 5, 16, 17, 37}) {  // whole vectors and tails
      for (const float x : {-inf, -1e30f, -std::numeric_limits<float>::max(), -104.0f, -200.0f}) {
        std::vector<float> s(static_cast<size_t>(n), x);
        s[1] = 0;
        float lse = -1, inv = -1;
        simd->softmax_row(s.data(), n, n, &lse, &inv);
        for (int64_t i = 0; i < n; i++) EXPECT_EQ(s[static_cast<size_t>(i)], i == 1 ? 1.0f : 0.0f) << isa_name(isa);
        EXPECT_EQ(lse, 0.0f);
        EXPECT_EQ(inv, 1.0f);
      }
      for (int64_t at = 0; at < n; at++) {
        for (const float bad : {nan, -nan, inf}) {
          std::vector<float> s(static_cast<size_t>(n), 0.5f), p = s, dp = s;
          s[static_cast<size_t>(at)] = p[static_cast<size_t>(at)] = bad;
          float lse = 0, inv = 0;
          simd->softmax_row(s.data(), n, n, &lse, &inv);
          EXPECT_TRUE(std::isnan(lse) && std::isnan(inv)) << isa_name(isa) << " n " << n << " at " << at;
          simd->softmax_row_bwd(p.data(), dp.data(), lse, 0, 1, n, n);
          EXPECT_TRUE(std::isnan(p[0]) && std::isnan(dp[0]));
        }
      }
    }
  }
}

TEST(Simd, SoftmaxOfFarAwayScores) {
  const std::vector<int32_t> target{3};
  for (const auto& [isa, simd] : simd_tables()) {
    for (const float x : {-1e4f, -200.0f, 200.0f, 1e4f}) {  // exp of them under- or overflows
      for (const int64_t n : {5, 16, 37}) {
        std::vector<float> s(static_cast<size_t>(n), x);
        float logp = 0, lse = 0, inv = 0;
        const double log_n = std::log(static_cast<double>(n));
        simd->logprob_fwd(&logp, &lse, s.data(), target.data(), 1, n);
        EXPECT_NEAR(logp, -log_n, rounding(log_n)) << isa_name(isa) << " " << x;
        EXPECT_NEAR(lse, x + log_n, rounding(std::abs(x) + log_n)) << isa_name(isa) << " " << x;
        simd->softmax_row(s.data(), n, n, &lse, &inv);
        EXPECT_EQ(s, std::vector<float>(s.size(), 1.0f)) << isa_name(isa) << " " << x;
        EXPECT_NEAR(inv, 1.0 / static_cast<double>(n), rounding(1));
        EXPECT_NEAR(lse, x + log_n, rounding(std::abs(x) + log_n));
      }
    }
  }
}

// sigmoid as swiglu shows it with up = 1: gate * sigmoid(gate).
TEST(Simd, SigmoidOverItsWholeRange) {
  const int64_t f = 200001;
  for (const auto& [isa, simd] : simd_tables()) {
    std::vector<float> gate_up(static_cast<size_t>(2 * f), 1.0f), act(static_cast<size_t>(f));
    for (int64_t i = 0; i < f; i++)
      gate_up[static_cast<size_t>(i)] = -150.0f + 300.0f * static_cast<float>(i) / static_cast<float>(f - 1);
    simd->swiglu_fwd(act.data(), gate_up.data(), 1, f);
    for (size_t i = 0; i < act.size(); i++) {
      const double g = gate_up[i], exact = g / (1.0 + std::exp(-g));
      // 5 units in the last place; below -87 the result may vanish (it is smaller than 1.5e-36).
      ASSERT_NEAR(act[i], exact, 5 * 0x1p-23 * std::abs(exact) + (g < -87 ? 1.5e-36 : 0)) << isa_name(isa) << " " << g;
    }
  }
}

TEST(Simd, ToBf16RoundsToNearestEven) {
  struct {
    uint32_t in;
    uint16_t out;
  } const table[] = {
      {0x00000000, 0x0000}, {0x80000000, 0x8000}, {0x3f800000, 0x3f80}, {0x3f807fff, 0x3f80}, {0x3f808000, 0x3f80},
      {0x3f808001, 0x3f81}, {0x3f818000, 0x3f82}, {0xbf818000, 0xbf82}, {0x7f7fffff, 0x7f80}, {0x7f800000, 0x7f80},
      {0xff800000, 0xff80}, {0x7f800001, 0x7fc0}, {0xffc12345, 0xffc1}, {0x00000001, 0x0000}, {0x00018000, 0x0002},
  };
  for (const auto& [isa, simd] : simd_tables()) {
    for (int shift = 0; shift < 3; shift++) {  // each case in vectors and in tails
      std::vector<float> x(static_cast<size_t>(shift), 0.0f);
      for (int repeat = 0; repeat < 3; repeat++)
        for (const auto& c : table) x.push_back(std::bit_cast<float>(c.in));
      cases::Guarded<uint16_t> y(x.size(), 1);
      simd->to_bf16(y.data(), x.data(), static_cast<int64_t>(x.size()));
      EXPECT_TRUE(y.intact());
      for (size_t i = static_cast<size_t>(shift); i < x.size(); i++)
        EXPECT_EQ(y.data()[i], table[(i - static_cast<size_t>(shift)) % std::size(table)].out) << isa_name(isa) << i;
    }
  }
}

}  // namespace mm
