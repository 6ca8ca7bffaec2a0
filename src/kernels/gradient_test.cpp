// The specification's gradients against central differences, all in double: L = sum of c * output with random c, and
// the op's backward run with c as the output's gradient.
#include <gtest/gtest.h>

#include <functional>

#include "kernels/cases/check_op.h"
#include "kernels/ref/ref_attention.h"
#include "kernels/ref/ref_ops.h"

namespace mm {

namespace {

using Vec = std::vector<double>;

Vec random(int64_t n, uint64_t stream) {
  const cases::Input x(n, stream);
  return {x.get<double>(), x.get<double>() + n};
}

Vec zeros(int64_t n) { return Vec(static_cast<size_t>(n)); }

double inner(const Vec& a, const Vec& b) {
  double s = 0;
  for (size_t i = 0; i < a.size(); i++) s += a[i] * b[i];
  return s;
}

// Step 1e-5: the truncation (1e-10) and the rounding of L (1e-16 * |L| / 1e-5) both stay far below 1e-7.
void check_gradient(const char* name, Vec& x, const Vec& gradient, const std::function<double()>& loss) {
  ASSERT_EQ(x.size(), gradient.size());
  constexpr double step = 1e-5;
  for (size_t i = 0; i < x.size(); i++) {
    const double at = x[i];
    x[i] = at + step;
    const double up = loss();
    x[i] = at - step;
    const double down = loss();
    x[i] = at;
    const double fd = (up - down) / (2 * step);
    ASSERT_NEAR(gradient[i], fd, 1e-7 * (1 + std::abs(fd))) << name << "[" << i << "]";
  }
}

}  // namespace

TEST(Gradient, Linear) {
  const int64_t m = 3, n = 5, k = 4;
  Vec x = random(m * k, 1), w = random(n * k, 2);
  const Vec c = random(m * n, 3);
  const auto loss = [&] {
    Vec y = zeros(m * n);
    ref::linear_fwd<double>(y.data(), n, x.data(), k, w.data(), m, n, k, false, false);
    return inner(c, y);
  };
  Vec dx = zeros(m * k), dw = zeros(n * k);
  ref::linear_bwd<double>(dx.data(), k, dw.data(), c.data(), n, x.data(), k, w.data(), m, n, k, false, false);
  check_gradient("dx", x, dx, loss);
  check_gradient("dw", w, dw, loss);
}

TEST(Gradient, Embed) {
  const int64_t n = 6, d = 3;
  const std::vector<int32_t> ids{2, 0, 2, 1, 2, 0};
  Vec table = random(4 * d, 1), dtable = zeros(4 * d);
  const Vec c = random(n * d, 2);
  ref::embed_bwd(dtable.data(), c.data(), ids.data(), n, d);
  check_gradient("dtable", table, dtable, [&] {
    Vec out = zeros(n * d);
    ref::embed_fwd(out.data(), table.data(), ids.data(), n, d);
    return inner(c, out);
  });
}

TEST(Gradient, Rmsnorm) {
  const int64_t n = 3, d = 7;
  for (const double scale : {1.0, 1e-3}) {  // 1e-3: eps counts
    Vec x = random(n * d, 1), w = random(d, 2), rstd = zeros(n), dx = zeros(n * d), dw = zeros(d);
    for (double& v : x) v *= scale;
    const Vec c = random(n * d, 3);
    const float eps = 1e-2f;
    const auto loss = [&] {
      Vec y = zeros(n * d);
      ref::rmsnorm_fwd<double>(y.data(), rstd.data(), x.data(), w.data(), eps, n, d);
      return inner(c, y);
    };
    loss();
    ref::rmsnorm_bwd<double>(dx.data(), dw.data(), c.data(), x.data(), rstd.data(), w.data(), n, d);
    check_gradient("dx", x, dx, loss);
    check_gradient("dw", w, dw, loss);
  }
}

TEST(Gradient, QkNormRope) {
  const int64_t n = 3;
  const int heads = 4, kv_heads = 2, dh = 6;
  const int64_t kv_width = kv_heads * dh, q_width = heads * dh, width = q_width + 2 * kv_width;
  std::vector<float> cos, sin;
  for (int i = 0; i < 5 * dh / 2; i++) {
    cos.push_back(static_cast<float>(std::cos(0.7 * i)));
    sin.push_back(static_cast<float>(std::sin(0.7 * i)));
  }
  const std::vector<int32_t> positions{0, 4, 2};
  const NormRopeArgs args{.cos = cos.data(),
                          .sin = sin.data(),
                          .positions = positions.data(),
                          .n = n,
                          .n_head = heads,
                          .n_kv_head = kv_heads,
                          .d_head = dh};
  for (const bool norm : {true, false}) {
    Vec qkv = random(n * width, 1), wq = random(dh, 2), wk = random(dh, 3), dwq = zeros(dh), dwk = zeros(dh);
    const Vec cq = random(n * q_width, 4), ck = random(n * kv_width, 5), cv = random(n * kv_width, 6);
    double* const q_weight = norm ? wq.data() : nullptr;
    double* const k_weight = norm ? wk.data() : nullptr;
    const auto loss = [&] {
      Vec q = zeros(n * q_width), k = zeros(n * kv_width), v = zeros(n * kv_width);
      ref::qk_norm_rope_fwd<double>(q.data(), k.data(), kv_width, v.data(), kv_width, nullptr, qkv.data(), q_weight,
                                    k_weight, args);
      return inner(cq, q) + inner(ck, k) + inner(cv, v);
    };
    Vec dqkv = zeros(n * width);
    for (int64_t t = 0; t < n; t++) {
      std::copy_n(&cq[static_cast<size_t>(t * q_width)], q_width, &dqkv[static_cast<size_t>(t * width)]);
      std::copy_n(&ck[static_cast<size_t>(t * kv_width)], kv_width, &dqkv[static_cast<size_t>(t * width + q_width)]);
      std::copy_n(&cv[static_cast<size_t>(t * kv_width)], kv_width,
                  &dqkv[static_cast<size_t>(t * width + q_width + kv_width)]);
    }
    ref::qk_norm_rope_bwd<double>(dqkv.data(), norm ? dwq.data() : nullptr, norm ? dwk.data() : nullptr, qkv.data(),
                                  q_weight, k_weight, args);
    check_gradient("dqkv", qkv, dqkv, loss);
    check_gradient("dq_weight", wq, dwq, loss);  // both sides zero without the norm
    check_gradient("dk_weight", wk, dwk, loss);
  }
}

TEST(Gradient, Attention) {
  const int heads = 4, kv_heads = 2, dh = 4;
  const std::vector<int32_t> cu{0, 5, 6, 6, 9};
  const int64_t n = cu.back(), ldq = heads * dh, ldkv = kv_heads * dh;
  for (const float p : {0.0f, 0.3f}) {
    const AttentionArgs args{.ldq = ldq,
                             .ldk = ldkv,
                             .ldv = ldkv,
                             .ldo = ldq,
                             .cu = cu.data(),
                             .n_seq = 4,
                             .n_head = heads,
                             .n_kv_head = kv_heads,
                             .d_head = dh,
                             .scale = 0.5f,
                             .dropout = p,
                             .seed = 5,
                             .stream = 6};
    const AttentionBwdArgs bwd{.fwd = args, .lddout = ldq, .lddq = ldq, .lddk = ldkv, .lddv = ldkv};
    Vec q = random(n * ldq, 1), k = random(n * ldkv, 2), v = random(n * ldkv, 3);
    Vec dq = zeros(n * ldq), dk = zeros(n * ldkv), dv = zeros(n * ldkv);
    const Vec c = random(n * ldq, 4);
    ref::attention_bwd<double>(bwd, q.data(), k.data(), v.data(), c.data(), dq.data(), dk.data(), dv.data());
    const auto loss = [&] {
      Vec out = zeros(n * ldq);
      ref::attention_fwd<double>(args, q.data(), k.data(), v.data(), out.data(), static_cast<double*>(nullptr));
      return inner(c, out);
    };
    check_gradient("dq", q, dq, loss);
    check_gradient("dk", k, dk, loss);
    check_gradient("dv", v, dv, loss);
  }
}

TEST(Gradient, Swiglu) {
  const int64_t n = 3, f = 5;
  Vec gate_up = random(n * 2 * f, 1), d = zeros(n * 2 * f);
  for (double& x : gate_up) x *= 3;
  const Vec c = random(n * f, 2);
  ref::swiglu_bwd<double>(d.data(), c.data(), gate_up.data(), n, f);
  check_gradient("dgate_up", gate_up, d, [&] {
    Vec act = zeros(n * f);
    ref::swiglu_fwd<double>(act.data(), gate_up.data(), n, f);
    return inner(c, act);
  });
}

TEST(Gradient, Logprob) {
  const int64_t n = 4, v = 9;
  Vec logits = random(n * v, 1);
  for (double& x : logits) x *= 3;
  const Vec g = random(n, 2);
  const std::vector<int32_t> targets{0, 8, 3, 3};
  Vec logp = zeros(n), lse = zeros(n);
  const auto loss = [&] {
    ref::logprob_fwd<double>(logp.data(), lse.data(), logits.data(), targets.data(), n, v);
    return inner(g, logp);
  };
  loss();
  Vec d = logits;
  ref::logprob_bwd<double>(d.data(), lse.data(), g.data(), targets.data(), n, v);
  check_gradient("dlogits", logits, d, loss);
}

TEST(Gradient, Dropout) {
  const int64_t n = 37;
  Vec x = random(n, 1);
  const Vec c = random(n, 2);
  Vec d = c;
  ref::dropout(d.data(), 0.4f, 1, 2, n);
  check_gradient("dx", x, d, [&] {
    Vec y = x;
    ref::dropout(y.data(), 0.4f, 1, 2, n);
    return inner(c, y);
  });
}

// L = sum of c * weights + sum over tokens of daux . scores; the choice of experts is constant around the point.
TEST(Gradient, MoeRoute) {
  const int64_t n = 5;
  const int experts = 6;
  for (const bool norm : {true, false}) {
    for (const int top_k : {1, 2, 6}) {
      for (const double aux : {0.0, 1.0}) {
        Vec logits = random(n * experts, 1), scores = zeros(n * experts), weights = zeros(n * top_k);
        const Vec c = random(n * top_k, 2);
        Vec daux = random(experts, 3);
        for (double& x : daux) x *= aux;
        std::vector<int32_t> chosen(static_cast<size_t>(n * top_k));
        const auto loss = [&] {
          ref::moe_route_fwd<double>(scores.data(), chosen.data(), weights.data(), logits.data(), n, experts, top_k,
                                     norm);
          double s = inner(c, weights);
          for (size_t i = 0; i < scores.size(); i++) s += daux[i % experts] * scores[i];
          return s;
        };
        loss();
        Vec d = zeros(n * experts);
        ref::moe_route_bwd<double>(d.data(), c.data(), daux.data(), scores.data(), chosen.data(), n, experts, top_k,
                                   norm);
        check_gradient("dlogits", logits, d, loss);
      }
    }
  }
}

TEST(Gradient, MoeMoves) {
  const int64_t n = 4, d = 3;
  const int top_k = 2;
  const std::vector<int32_t> slot{5, 0, 3, 1, 7, 2, 4, 6};
  std::vector<int32_t> token(slot.size());  // of each slot
  for (size_t i = 0; i < slot.size(); i++) token[static_cast<size_t>(slot[i])] = static_cast<int32_t>(i / top_k);
  Vec y = random(n * top_k * d, 1), weights = random(n * top_k, 2), dy = zeros(n * top_k * d),
      dweights = zeros(n * top_k);
  const Vec c = random(n * d, 3);
  const auto combined = [&] {
    Vec out = zeros(n * d);
    ref::moe_combine_fwd(out.data(), y.data(), slot.data(), weights.data(), n, top_k, d);
    return inner(c, out);
  };
  ref::moe_combine_bwd<double>(dy.data(), dweights.data(), c.data(), y.data(), slot.data(), weights.data(), n, top_k,
                               d);
  check_gradient("dy", y, dy, combined);
  check_gradient("dweights", weights, dweights, combined);

  // scatter_add is the backward of gathering each token's row into its slots.
  Vec x = random(n * d, 4), dx = zeros(n * d);
  const Vec c_slots = random(n * top_k * d, 5);
  ref::scatter_add<double>(dx.data(), c_slots.data(), slot.data(), n, top_k, d);
  check_gradient("dx", x, dx, [&] {
    Vec rows = zeros(n * top_k * d);
    ref::gather_rows(rows.data(), x.data(), token.data(), n * top_k, d);
    return inner(c_slots, rows);
  });
}

}  // namespace mm
