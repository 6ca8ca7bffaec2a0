// A NaN that enters an op must come out: the trainer stops on a loss or gradient norm that is not finite, so a kernel
// that loses one (a max that skips it, a clamp, a comparison) would let a broken run go on.
#include "kernels/cases/check_op.h"

namespace mm {

using NanVisible = cases::KernelTest;

namespace {

constexpr float nan = std::numeric_limits<float>::quiet_NaN();

std::vector<float> random(int64_t n, uint64_t stream) {
  const cases::Input x(n, stream);
  return {x.f(), x.f() + n};
}

std::vector<float> buffer(int64_t n) { return std::vector<float>(static_cast<size_t>(n)); }

bool all_nan(const std::vector<float>& x, int64_t begin, int64_t end) {
  return std::all_of(x.begin() + begin, x.begin() + end, [](float v) { return std::isnan(v); });
}

bool all_finite(const std::vector<float>& x, int64_t begin, int64_t end) {
  return std::all_of(x.begin() + begin, x.begin() + end, [](float v) { return std::isfinite(v); });
}

// f(kernels, position of the NaN): every backend on one thread, NaN in the first, a middle and the last of n places.
template <class F>
void for_each_place(int64_t n, F&& f, const std::vector<cases::Backend>& backends = cases::cpu_backends()) {
  set_num_threads(1);
  for (const cases::Backend& b : backends) {
    if (b.threads > 1) continue;
    for (const int64_t at : {int64_t{0}, n / 2, n - 1}) {
      SCOPED_TRACE(fmt::format("{} NaN at {}", b.name, at));
      f(b.kernels, at);
    }
  }
  set_num_threads(0);
}

}  // namespace

TEST_F(NanVisible, Linear) {
  const int64_t n = 33, k = 65;
  for (const int64_t m : {1, 4, 20}) {  // matrix-vector and matrix products
    for (const bool bf16 : {false, matmul_bf16_available()}) {
      for_each_place(k, [&](const KernelTable& kernels, int64_t at) {
        auto x = random(m * k, 1), w = random(n * k, 2), y = buffer(m * n), dx = buffer(m * k), dw = buffer(n * k);
        x[static_cast<size_t>((m - 1) * k + at)] = nan;
        kernels.linear_fwd(y.data(), n, x.data(), k, w.data(), m, n, k, false, bf16);
        EXPECT_TRUE(all_nan(y, (m - 1) * n, m * n));
        EXPECT_TRUE(all_finite(y, 0, (m - 1) * n)) << "NaN in rows of other tokens";
        auto dy = random(m * n, 3);
        kernels.linear_bwd(dx.data(), k, dw.data(), dy.data(), n, x.data(), k, w.data(), m, n, k, false, bf16);
        for (int64_t i = 0; i < n; i++) EXPECT_TRUE(std::isnan(dw[static_cast<size_t>(i * k + at)]));
        EXPECT_TRUE(all_finite(dx, 0, m * k));
        dy[static_cast<size_t>(at % n)] = nan;
        kernels.linear_bwd(dx.data(), k, dw.data(), dy.data(), n, x.data(), k, w.data(), m, n, k, false, bf16);
        EXPECT_TRUE(all_nan(dx, 0, k));
        EXPECT_TRUE(all_nan(dw, at % n * k, (at % n + 1) * k));
      });
    }
  }
}

// Scratch that an earlier call left full of NaN must not reach the next one.
TEST_F(NanVisible, LinearLeavesNoneBehind) {
  const int64_t n = 32, k = 48, many = 64, few = 5;
  for (const bool bf16 : {false, matmul_bf16_available()}) {
    const std::vector<float> bad_x(static_cast<size_t>(many * k), nan), bad_dy(static_cast<size_t>(many * n), nan);
    const auto x = random(few * k, 1), w = random(n * k, 2), dy = random(few * n, 3);
    auto y = buffer(many * n), dx = buffer(many * k), dw = buffer(n * k);
    const KernelTable& kernels = cpu_kernels();
    kernels.linear_fwd(y.data(), n, bad_x.data(), k, w.data(), many, n, k, false, bf16);
    kernels.linear_bwd(dx.data(), k, dw.data(), bad_dy.data(), n, bad_x.data(), k, w.data(), many, n, k, false, bf16);
    EXPECT_TRUE(all_nan(y, 0, many * n) && all_nan(dx, 0, many * k) && all_nan(dw, 0, n * k));
    std::fill(dw.begin(), dw.end(), 0.0f);
    kernels.linear_fwd(y.data(), n, x.data(), k, w.data(), few, n, k, false, bf16);
    kernels.linear_bwd(dx.data(), k, dw.data(), dy.data(), n, x.data(), k, w.data(), few, n, k, false, bf16);
    EXPECT_TRUE(all_finite(y, 0, few * n) && all_finite(dx, 0, few * k) && all_finite(dw, 0, n * k));
  }
}

TEST_F(NanVisible, Norms) {
  const int64_t n = 3, d = 37;
  for_each_place(
      d,
      [&](const KernelTable& k, int64_t at) {
        auto x = random(n * d, 1), w = random(d, 2), y = buffer(n * d), rstd = buffer(n), dx = buffer(n * d),
             dw = buffer(d);
        x[static_cast<size_t>(d + at)] = nan;
        k.rmsnorm_fwd(y.data(), rstd.data(), x.data(), w.data(), 1e-6f, n, d);
        EXPECT_TRUE(all_nan(y, d, 2 * d) && std::isnan(rstd[1]));
        EXPECT_TRUE(all_finite(y, 0, d) && all_finite(y, 2 * d, 3 * d));
        const auto dy = random(n * d, 3);
        k.rmsnorm_bwd(dx.data(), dw.data(), dy.data(), x.data(), rstd.data(), w.data(), n, d);
        EXPECT_TRUE(all_nan(dx, d, 2 * d) && all_nan(dw, 0, d));
      },
      cases::cpu_and_row_backends());
}

TEST_F(NanVisible, QkNormRope) {
  const int64_t n = 2;
  const int d = 34, width = 4 * d;  // 2 query heads, 1 key head, 1 value head
  for_each_place(d, [&](const KernelTable& k, int64_t at) {
    auto qkv = random(n * width, 1), wq = random(d, 2), wk = random(d, 3), cos = random(d, 4), sin = random(d, 5);
    auto q = buffer(n * 2 * d), keys = buffer(n * d), v = buffer(n * d), dqkv = random(n * width, 6), dwq = buffer(d),
         dwk = buffer(d);
    const std::vector<int32_t> positions{0, 1};
    const NormRopeArgs args{.q_weight = wq.data(),
                            .k_weight = wk.data(),
                            .cos = cos.data(),
                            .sin = sin.data(),
                            .positions = positions.data(),
                            .n = n,
                            .n_head = 2,
                            .n_kv_head = 1,
                            .d_head = d};
    for (const int64_t head : {0, 2, 3}) qkv[static_cast<size_t>(head * d + at)] = nan;
    k.qk_norm_rope_fwd(q.data(), keys.data(), d, v.data(), d, nullptr, qkv.data(), args);
    EXPECT_TRUE(all_nan(q, 0, d) && all_finite(q, d, 2 * d) && all_nan(keys, 0, d));
    EXPECT_TRUE(std::isnan(v[static_cast<size_t>(at)]));
    k.qk_norm_rope_bwd(dqkv.data(), dwq.data(), dwk.data(), qkv.data(), args);
    EXPECT_TRUE(all_nan(dqkv, 0, d) && all_finite(dqkv, d, 2 * d) && all_nan(dqkv, 2 * d, 3 * d));
    EXPECT_TRUE(all_nan(dwq, 0, d) && all_nan(dwk, 0, d));
  });
}

// NaN in q reaches its own row, NaN in k or v every later row of the sequence, and none reaches another sequence.
TEST_F(NanVisible, Attention) {
  const int dh = 32;
  for (const int32_t len : {1, 2, 5, 70}) {
    const std::vector<int32_t> cu{0, len, 2 * len};
    const int64_t n = cu.back(), half = len * dh;
    for_each_place(half, [&](const KernelTable& kernels, int64_t at) {
      const int64_t row = at / dh;
      for (const char which : {'q', 'k', 'v'}) {
        SCOPED_TRACE(fmt::format("{} of {} rows", which, len));
        auto q = random(n * dh, 1), k = random(n * dh, 2), v = random(n * dh, 3), out = buffer(n * dh), lse = buffer(n),
             dq = out, dk = out, dv = out;
        const auto dout = random(n * dh, 4);
        (which == 'q' ? q : which == 'k' ? k : v)[static_cast<size_t>(at)] = nan;
        AttentionArgs a{.q = q.data(), .k = k.data(), .v = v.data(), .out = out.data(), .lse = lse.data()};
        a.ldq = a.ldk = a.ldv = a.ldo = a.d_head = dh;
        a.cu = cu.data();
        a.n_seq = 2;
        a.n_head = a.n_kv_head = 1;
        kernels.attention_fwd(a);
        if (which == 'v') {
          for (int64_t i = row; i < len; i++) EXPECT_TRUE(std::isnan(out[static_cast<size_t>(i * dh + at % dh)]));
        } else {
          EXPECT_TRUE(all_nan(out, row * dh, which == 'q' ? (row + 1) * dh : half));
        }
        EXPECT_TRUE(all_finite(out, half, 2 * half)) << "NaN in another sequence";
        kernels.attention_bwd({.fwd = a,
                               .dout = dout.data(),
                               .dq = dq.data(),
                               .dk = dk.data(),
                               .dv = dv.data(),
                               .lddout = dh,
                               .lddq = dh,
                               .lddk = dh,
                               .lddv = dh});
        EXPECT_TRUE(all_nan(dq, row * dh, (row + 1) * dh));
        EXPECT_FALSE(all_finite(dk, 0, half));
        EXPECT_TRUE(which == 'v' || !all_finite(dv, 0, half));  // dv = P^T dout does not see v
        EXPECT_TRUE(all_finite(dq, half, 2 * half) && all_finite(dk, half, 2 * half) && all_finite(dv, half, 2 * half));
      }
    });
  }
}

TEST_F(NanVisible, Swiglu) {
  const int64_t f = 37;
  for_each_place(
      f,
      [&](const KernelTable& k, int64_t at) {
        for (const int64_t part : {0, 1, 2}) {  // gate, up, dact
          auto gate_up = random(2 * f, 1), dact = random(f, 2), act = buffer(f), d = buffer(2 * f);
          (part < 2 ? gate_up : dact)[static_cast<size_t>(part % 2 * f + at)] = nan;
          k.swiglu_fwd(act.data(), gate_up.data(), 1, f);
          EXPECT_EQ(std::isnan(act[static_cast<size_t>(at)]), part < 2);
          k.swiglu_bwd(d.data(), dact.data(), gate_up.data(), 1, f);
          EXPECT_TRUE(std::isnan(d[static_cast<size_t>(at)]));
        }
      },
      cases::cpu_and_row_backends());
}

TEST_F(NanVisible, Logprob) {
  const int64_t n = 3, v = 67;
  const std::vector<int32_t> targets{5, 6, 7};
  for_each_place(
      v,
      [&](const KernelTable& k, int64_t at) {
        for (const float bad : {nan, std::numeric_limits<float>::infinity()}) {
          auto logits = random(n * v, 1), logp = buffer(n), lse = buffer(n);
          const auto g = random(n, 2);
          logits[static_cast<size_t>(v + at)] = bad;
          k.logprob_fwd(logp.data(), lse.data(), logits.data(), targets.data(), n, v);
          EXPECT_TRUE(std::isnan(logp[1]) && std::isnan(lse[1]));
          EXPECT_TRUE(std::isfinite(logp[0]) && std::isfinite(logp[2]));
          k.logprob_bwd(logits.data(), lse.data(), g.data(), targets.data(), n, v);
          EXPECT_TRUE(all_finite(logits, 0, v) && all_nan(logits, v, 2 * v) && all_finite(logits, 2 * v, 3 * v));
        }
      },
      cases::cpu_and_row_backends());
}

// The experts stay in range: they index rows.
TEST_F(NanVisible, MoeRoute) {
  for_each_place(6, [&](const KernelTable& k, int64_t at) {
    auto logits = random(12, 1), scores = buffer(12), weights = buffer(6), d = buffer(12);
    const auto dweights = random(6, 2), daux = random(6, 3);
    std::vector<int32_t> experts(6, -1);
    logits[static_cast<size_t>(at)] = nan;
    k.moe_route_fwd(scores.data(), experts.data(), weights.data(), logits.data(), 2, 6, 3, true);
    EXPECT_TRUE(all_nan(scores, 0, 6) && all_nan(weights, 0, 3) && all_finite(weights, 3, 6));
    for (int j = 0; j < 3; j++) {
      EXPECT_TRUE(experts[static_cast<size_t>(j)] >= 0 && experts[static_cast<size_t>(j)] < 6);
      for (int i = 0; i < j; i++) EXPECT_NE(experts[static_cast<size_t>(i)], experts[static_cast<size_t>(j)]);
    }
    k.moe_route_bwd(d.data(), dweights.data(), daux.data(), scores.data(), experts.data(), 2, 6, 3, true);
    EXPECT_TRUE(all_nan(d, 0, 6) && all_finite(d, 6, 12));
  });
}

TEST_F(NanVisible, MoeCombine) {
  const int64_t d = 33;
  const std::vector<int32_t> slot{1, 0};
  for_each_place(d, [&](const KernelTable& k, int64_t at) {
    auto y = random(2 * d, 1), out = random(d, 2), dout = random(d, 3), dy = buffer(2 * d), dweights = buffer(2);
    const std::vector<float> weights{0.0f, 1.0f};  // a NaN times a weight of 0 stays
    y[static_cast<size_t>(d + at)] = nan;
    k.moe_combine_fwd(out.data(), y.data(), slot.data(), weights.data(), 1, 2, d);
    EXPECT_TRUE(std::isnan(out[static_cast<size_t>(at)]));
    k.scatter_add(out.data(), y.data(), slot.data(), 1, 2, d);
    EXPECT_TRUE(std::isnan(out[static_cast<size_t>(at)]));
    dout[static_cast<size_t>(at)] = nan;
    k.moe_combine_bwd(dy.data(), dweights.data(), dout.data(), y.data(), slot.data(), weights.data(), 1, 2, d);
    EXPECT_TRUE(all_nan(dweights, 0, 2));
    EXPECT_TRUE(std::isnan(dy[static_cast<size_t>(at)]) && std::isnan(dy[static_cast<size_t>(d + at)]));
  });
}

TEST_F(NanVisible, Vectors) {
  const int64_t n = 70001;
  for_each_place(
      n,
      [&](const KernelTable& k, int64_t at) {
        auto x = random(n, 1), p = random(n, 2), m = random(n, 3), v = buffer(n), y = random(n, 4);
        EXPECT_TRUE(std::isfinite(k.sum_sq(x.data(), n)));
        x[static_cast<size_t>(at)] = nan;
        EXPECT_TRUE(std::isnan(k.sum_sq(x.data(), n)));
        k.add(y.data(), x.data(), n);
        EXPECT_TRUE(std::isnan(y[static_cast<size_t>(at)]));
        k.adamw(p.data(), x.data(), m.data(), v.data(), {.lr = 1e-3, .grad_scale = 1.0f}, n);
        EXPECT_TRUE(std::isnan(p[static_cast<size_t>(at)]));
        for (const uint64_t seed : {1, 2, 3, 4, 5, 6}) {  // dropped or kept
          auto z = x;
          k.dropout(z.data(), 0.5f, seed, 0, n);
          EXPECT_TRUE(std::isnan(z[static_cast<size_t>(at)]));
        }
        x[static_cast<size_t>(at)] = -std::numeric_limits<float>::infinity();
        EXPECT_TRUE(std::isinf(k.sum_sq(x.data(), n)));
      },
      cases::cpu_and_row_backends());
}

TEST_F(NanVisible, Embed) {
  const std::vector<int32_t> ids{1, 1, 0};
  for_each_place(33, [&](const KernelTable& k, int64_t at) {
    auto dout = random(99, 1), dtable = random(66, 2);
    dout[static_cast<size_t>(at)] = nan;
    k.embed_bwd(dtable.data(), dout.data(), ids.data(), 3, 33);
    EXPECT_TRUE(std::isnan(dtable[static_cast<size_t>(33 + at)]));
    EXPECT_TRUE(all_finite(dtable, 0, 33));
  });
}

}  // namespace mm
