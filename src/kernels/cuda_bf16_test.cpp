// The bf16 forms of the ops' CUDA kernels against the specification, for this GPU and as on sm_80.
#ifdef MM_CUDA
#include <numeric>

#include "kernels/cases/attention_cases.h"
#include "kernels/cases/check_op.h"
#include "kernels/cases/cuda_staging.h"
#include "kernels/cases/norm_cases.h"
#include "kernels/cases/row_cases.h"
#include "kernels/ref/ref_attention.h"
#include "kernels/ref/ref_ops.h"

namespace mm {
namespace {

using namespace cases::staging;  // NOLINT(google-build-using-namespace)

using cases::AttentionCase, cases::Input, cases::LogprobCase, cases::NormRopeCase, cases::RmsnormCase,
    cases::SwigluCase;

constexpr float eps = 1e-6f;

// N(0, 1) numbers rounded to bf16, as bf16, float and double.
struct Half {
  Input x;
  std::vector<uint16_t> bits;
  int skip;
  Half(int64_t n, uint64_t stream, int offset, float scale = 1.0f)
      : x(n, stream, offset, scale), bits(static_cast<size_t>(n + offset) + 1), skip(offset) {
    for (int64_t i = 0; i < n; i++) set(i, x.f()[i]);
  }
  void set(int64_t i, float value) {
    const uint16_t h = float_to_bf16(value);
    bits[static_cast<size_t>(i + skip)] = h;
    x.set(i, bf16_to_float(h));
  }
  template <class T>
  const T* get() const {
    return x.get<T>();
  }
  const uint16_t* h() const { return bits.data() + skip; }
};

struct HalfOutput {
  const char* name;
  std::vector<float> init;
  bool fp32 = false;  // statistics and gradients of weights
};

HalfOutput set_half(const char* name, int64_t n, bool fp32 = false) {
  return {name, std::vector<float>(static_cast<size_t>(n), cases::fill()), fp32};
}
HalfOutput added_half(const char* name, int64_t n, uint64_t stream, bool fp32 = false) {
  const Input x(n, stream);
  return {name, {x.f(), x.f() + n}, fp32};
}

void round_all(std::vector<float>& v) {
  for (float& x : v) x = bf16_to_float(float_to_bf16(x));
}

// At most twice the error of the plain fp32 run whose results are rounded to bf16, plus one rounding of the largest
// element; fp32 outputs have rounded inputs alone, so theirs is an error of fp32 arithmetic with fast exponentials.
void expect_near(const HalfOutput& o, const std::vector<float>& got, const std::vector<float>& plain,
                 const std::vector<double>& exact) {
  double err = 0, err_plain = 0, largest = 0;
  size_t at = 0;
  for (size_t i = 0; i < got.size(); i++) {
    if (std::isnan(exact[i])) {
      ASSERT_TRUE(cases::same_bits(got[i], o.init[i])) << o.name << "[" << i << "] is not the op's to write";
      continue;
    }
    const double e = std::abs(got[i] - exact[i]);
    ASSERT_TRUE(std::isfinite(e)) << o.name << "[" << i << "] is " << got[i] << ", exact " << exact[i];
    if (e > err) err = e, at = i;
    err_plain = std::max(err_plain, std::abs(plain[i] - exact[i]));
    largest = std::max(largest, std::abs(exact[i]));
  }
  // rounding(16): a gradient that is exactly zero is a difference of two fp32 sums there.
  const double floor = o.fp32 ? 0x1p-14 * largest + cases::rounding(1) : 0x1p-8 * largest + cases::rounding(16);
  EXPECT_LE(err, 2 * err_plain + floor) << o.name << "[" << at << "] is " << got[at] << ", exact " << exact[at]
                                        << ", plain is off by " << err_plain;
}

// spec(T** out) as in check_op; run(context, staging, out) launches on device pointers. On a newer GPU the kernels for
// sm_80 run as well.
template <class Spec, class Run>
void check_bf16(const std::string& name, int offset, std::vector<HalfOutput> outputs, Spec&& spec, Run&& run) {
  std::vector<std::vector<double>> exact;
  std::vector<std::vector<float>> plain;
  for (HalfOutput& o : outputs) {
    if (!o.fp32) round_all(o.init);
    exact.emplace_back(o.init.begin(), o.init.end()).push_back(0.0);
    plain.emplace_back(o.init).push_back(0.0f);
  }
  std::vector<double*> exact_ptr;
  std::vector<float*> plain_ptr;
  for (auto& v : exact) exact_ptr.push_back(v.data());
  for (auto& v : plain) plain_ptr.push_back(v.data());
  spec(exact_ptr.data());
  spec(plain_ptr.data());
  for (size_t i = 0; i < outputs.size(); i++) {
    if (!outputs[i].fp32) round_all(plain[i]);
  }
  cuda::Context ctx = context();
  for (const int arch : {ctx.arch, 80}) {
    if (arch == 80 && ctx.arch == 80) continue;
    ctx.arch = arch;
    SCOPED_TRACE(fmt::format("{} as on sm_{}", name, arch));
    std::vector<std::vector<float>> floats;
    std::vector<std::vector<uint16_t>> halves;
    const auto skip = static_cast<size_t>(offset);
    for (const HalfOutput& o : outputs) {
      floats.emplace_back(o.init).push_back(0.0f);
      halves.emplace_back(skip, uint16_t{0});
      for (const float x : floats.back()) halves.back().push_back(float_to_bf16(x));
    }
    staged(name, [&](Staging& s) {
      std::vector<void*> out;
      for (size_t i = 0; i < outputs.size(); i++) {
        const auto n = static_cast<int64_t>(outputs[i].init.size());
        if (outputs[i].fp32) out.push_back(s.out(floats[i].data(), n));
        else out.push_back(s.out(halves[i].data() + skip, n));
      }
      run(std::as_const(ctx), s, out.data());
    });
    for (size_t i = 0; i < outputs.size(); i++) {
      floats[i].pop_back();
      for (size_t j = 0; j < floats[i].size() && !outputs[i].fp32; j++)
        floats[i][j] = bf16_to_float(halves[i][skip + j]);
      expect_near(outputs[i], floats[i], plain[i], exact[i]);
    }
  }
}

class CudaBf16 : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!cuda_status().usable) GTEST_SKIP() << "NOT TESTED: " << cuda_status().why_not;
  }
};

template <class Case, size_t n>
std::vector<Case> with_more(const Case (&cases)[n], std::initializer_list<Case> more) {
  std::vector<Case> all(cases, cases + n);
  all.insert(all.end(), more);
  return all;
}

}  // namespace

TEST_F(CudaBf16, Rmsnorm) {
  for (const RmsnormCase& c : with_more(cases::rmsnorm_cases, {{700, 768}, {5, 4096}, {3, 20000}})) {
    const int64_t size = c.n * c.d;
    const Half x(size, 1, c.offset, c.scale), w(c.d, 2, c.offset), dy(size, 3, c.offset);
    check_bf16(
        "rmsnorm_fwd " + c.name(), c.offset, {set_half("y", size), set_half("rstd", c.n, true)},
        [&]<class T>(T** out) { ref::rmsnorm_fwd<T, T>(out[0], out[1], x.get<T>(), w.get<T>(), eps, c.n, c.d); },
        [&](const cuda::Context& ctx, Staging& s, void** out) {
          cuda::rmsnorm_fwd(ctx, bf16, out[0], static_cast<float*>(out[1]), s.in(x.h(), size), s.in(w.h(), c.d), eps,
                            c.n, c.d);
        });
    Input rstd(c.n, 4);
    for (int64_t t = 0; t < c.n; t++)
      rstd.set(t, static_cast<float>(ref::inv_rms<double>(x.get<double>() + t * c.d, c.d, eps)));
    check_bf16(
        "rmsnorm_bwd " + c.name(), c.offset, {added_half("dx", size, 5), added_half("dw", c.d, 6, true)},
        [&]<class T>(T** out) {
          ref::rmsnorm_bwd<T, T>(out[0], out[1], dy.get<T>(), x.get<T>(), rstd.get<T>(), w.get<T>(), c.n, c.d);
        },
        [&](const cuda::Context& ctx, Staging& s, void** out) {
          cuda::rmsnorm_bwd(ctx, bf16, out[0], static_cast<float*>(out[1]), s.in(dy.h(), size), s.in(x.h(), size),
                            s.in(rstd.f(), c.n), s.in(w.h(), c.d), c.n, c.d);
        });
  }
}

TEST_F(CudaBf16, QkNormRope) {
  constexpr int max_pos = 97;
  for (const NormRopeCase& c : cases::norm_rope_cases) {
    const int64_t half = c.d_head / 2, size = c.n * (c.n_head + 2 * c.n_kv_head) * c.d_head,
                  rows = c.slots ? 2 * c.n : c.n, width = int64_t{c.n_kv_head} * c.d_head, ld = width + c.pad;
    const Half qkv(size, 1, c.offset), wq(c.d_head, 2, c.offset), wk(c.d_head, 3, c.offset);
    Input cos(max_pos * half, 4), sin(max_pos * half, 5);
    for (int64_t i = 0; i < max_pos * half; i++) {
      cos.set(i, static_cast<float>(std::cos(37.0 * static_cast<double>(i % 1013))));
      sin.set(i, static_cast<float>(std::sin(37.0 * static_cast<double>(i % 1013))));
    }
    std::vector<int32_t> positions(static_cast<size_t>(c.n) + 1);
    std::vector<int64_t> slots(positions.size());
    for (int64_t t = 0; t < c.n; t++) {
      positions[static_cast<size_t>(t)] = static_cast<int32_t>(t * 31 % max_pos);
      slots[static_cast<size_t>(t)] = 2 * (c.n - 1 - t) + 1;
    }
    const int64_t* const slot = c.slots ? slots.data() : nullptr;
    const NormRopeArgs args{.cos = cos.f(),
                            .sin = sin.f(),
                            .positions = positions.data(),
                            .eps = eps,
                            .n = c.n,
                            .n_head = c.n_head,
                            .n_kv_head = c.n_kv_head,
                            .d_head = c.d_head};
    const auto on_device = [&](Staging& s) {
      return on_gpu(s, args, c.norm ? wq.h() : nullptr, c.norm ? wk.h() : nullptr);
    };
    check_bf16(
        "qk_norm_rope_fwd " + c.name(), c.offset,
        {set_half("q", c.n * c.n_head * c.d_head), set_half("k", extent(rows, ld, width)),
         set_half("v", extent(rows, ld, width))},
        [&]<class T>(T** out) {
          ref::qk_norm_rope_fwd<T, T>(out[0], out[1], ld, out[2], ld, slot, qkv.get<T>(),
                                      c.norm ? wq.get<T>() : nullptr, c.norm ? wk.get<T>() : nullptr, args);
        },
        [&](const cuda::Context& ctx, Staging& s, void** out) {
          cuda::qk_norm_rope_fwd(ctx, bf16, out[0], out[1], ld, out[2], ld, s.in(slot, c.n), s.in(qkv.h(), size),
                                 on_device(s));
        });
    std::vector<HalfOutput> outputs{added_half("dqkv", size, 6)};
    if (c.norm) outputs.push_back(added_half("dq_weight", c.d_head, 7, true));
    if (c.norm) outputs.push_back(added_half("dk_weight", c.d_head, 8, true));
    check_bf16(
        "qk_norm_rope_bwd " + c.name(), c.offset, outputs,
        [&]<class T>(T** out) {
          ref::qk_norm_rope_bwd<T, T>(out[0], c.norm ? out[1] : nullptr, c.norm ? out[2] : nullptr, qkv.get<T>(),
                                      c.norm ? wq.get<T>() : nullptr, c.norm ? wk.get<T>() : nullptr, args);
        },
        [&](const cuda::Context& ctx, Staging& s, void** out) {
          auto *dq = static_cast<float*>(c.norm ? out[1] : nullptr),
               *dk = static_cast<float*>(c.norm ? out[2] : nullptr);
          cuda::qk_norm_rope_bwd(ctx, bf16, out[0], dq, dk, s.in(qkv.h(), size), on_device(s));
        });
  }
}

TEST_F(CudaBf16, Swiglu) {
  for (const SwigluCase& c : cases::swiglu_cases) {
    const int64_t size = c.n * c.f;
    const Half gate_up(2 * size, 1, c.offset, c.scale), dact(size, 2, c.offset);
    const auto forward = [&]<class T>(T* act) { ref::swiglu_fwd<T, T>(act, gate_up.get<T>(), c.n, c.f); };
    check_bf16(
        "swiglu_fwd " + c.name(), c.offset, {set_half("act", size)}, [&]<class T>(T** out) { forward(out[0]); },
        [&](const cuda::Context& ctx, Staging& s, void** out) {
          cuda::swiglu_fwd(ctx, bf16, out[0], s.in(gate_up.h(), 2 * size), c.n, c.f);
        });
    check_bf16(
        "swiglu_bwd " + c.name(), c.offset, {set_half("dgate_up", 2 * size), set_half("act", size)},
        [&]<class T>(T** out) {
          ref::swiglu_bwd<T, T>(out[0], dact.get<T>(), gate_up.get<T>(), c.n, c.f);
          forward(out[1]);
        },
        [&](const cuda::Context& ctx, Staging& s, void** out) {
          cuda::swiglu_bwd(ctx, bf16, out[0], out[1], s.in(dact.h(), size), s.in(gate_up.h(), 2 * size), c.n, c.f);
        });
  }
}

TEST_F(CudaBf16, LogprobFwdBwd) {
  for (const LogprobCase& c : with_more(cases::logprob_cases, {{300, 6400}, {3, 32000}, {2, 40000}})) {
    Half logits(c.n * c.v, 1, c.offset, c.scale);
    const Input g(c.n, 2);
    std::vector<int32_t> targets(static_cast<size_t>(c.n) + 1);
    for (int64_t t = 0; t < c.n; t++) {
      targets[static_cast<size_t>(t)] = static_cast<int32_t>(t * 7919 % c.v);
      for (int64_t i = t * c.v; c.sure && i < (t + 1) * c.v; i++) logits.set(i, logits.get<float>()[i] + 64.0f);
      if (c.sure) logits.set(t * c.v + targets[static_cast<size_t>(t)], 69.1f + 5.7f * c.scale);
    }
    HalfOutput in_place = set_half("dlogits", c.n * c.v);
    std::copy_n(logits.get<float>(), in_place.init.size(), in_place.init.begin());
    check_bf16(
        "logprob_fwd_bwd " + c.name(), c.offset, {in_place, set_half("logp", c.n, true), set_half("lse", c.n, true)},
        [&]<class T>(T** out) {
          ref::logprob_fwd<T, T>(out[1], out[2], out[0], targets.data(), c.n, c.v);
          ref::logprob_bwd<T, T>(out[0], out[2], g.get<T>(), targets.data(), c.n, c.v);
        },
        [&](const cuda::Context& ctx, Staging& s, void** out) {
          cuda::logprob_fwd_bwd(ctx, bf16, out[0], static_cast<float*>(out[1]), static_cast<float*>(out[2]),
                                s.in(g.f(), c.n), s.in(targets.data(), c.n), c.n, c.v);
        });
  }
}

namespace {

// As in attention_test.cpp.
struct HalfAttention {
  int64_t n, n_kv, ldq, ldkv;
  Half q, k, v;
  std::vector<int32_t> cu{0}, kv_start, kv_len;
  AttentionArgs args;

  explicit HalfAttention(const AttentionCase& c)
      : n(c.n()),
        n_kv(std::accumulate(c.past.begin(), c.past.end(), n + static_cast<int64_t>(c.past.size()))),
        ldq(c.n_head * c.d_head + c.pad),
        ldkv(c.n_kv_head * c.d_head + c.pad),
        q(n * ldq, 1, c.offset),
        k(n_kv * ldkv, 2, c.offset),
        v(n_kv * ldkv, 3, c.offset) {
    int64_t end = n_kv;
    for (size_t i = 0; i < c.q_len.size(); i++) {
      cu.push_back(cu.back() + c.q_len[i]);
      if (c.past.empty()) continue;
      kv_len.push_back(c.past[i] + c.q_len[i]);
      end -= kv_len.back() + 1;
      kv_start.push_back(static_cast<int32_t>(end));
    }
    args.ldq = args.ldo = ldq, args.ldk = args.ldv = ldkv;
    args.cu = cu.data();
    args.kv_start = c.past.empty() ? nullptr : kv_start.data();
    args.kv_len = c.past.empty() ? nullptr : kv_len.data();
    args.n_seq = static_cast<int64_t>(c.q_len.size());
    args.n_head = c.n_head, args.n_kv_head = c.n_kv_head, args.d_head = c.d_head;
    args.scale = 1.0f / std::sqrt(static_cast<float>(c.d_head));
  }
};

// Every width on several tiles of 128 rows, beside those of the table.
std::vector<AttentionCase> half_cases() {
  std::vector<AttentionCase> all;
  for (const AttentionCase& c : cases::attention_cases) {
    if (c.dropout == 0 && c.d_head % 32 == 0) all.push_back(c);
  }
  for (const int d : {32, 64, 96, 128}) all.push_back({{200, 129, 3, 0, 300}, {}, 4, 2, d});
  return all;
}

void check_half_fwd(const AttentionCase& c) {
  const HalfAttention in(c);
  const AttentionExtents e(in.args);
  std::vector<HalfOutput> outputs{set_half("out", e.out)};
  if (c.lse) outputs.push_back(set_half("lse", e.lse, true));
  check_bf16(
      "attention_fwd " + c.name(), c.offset, outputs,
      [&]<class T>(T** out) {
        ref::attention_fwd<T, T>(in.args, in.q.get<T>(), in.k.get<T>(), in.v.get<T>(), out[0],
                                 c.lse ? out[1] : nullptr);
      },
      [&](const cuda::Context& ctx, Staging& s, void** out) {
        cuda::Attention a = lists_on_gpu(s, in.args);
        a.q = s.in(in.q.h(), e.q), a.k = s.in(in.k.h(), e.k), a.v = s.in(in.v.h(), e.v);
        a.out = out[0], a.lse = static_cast<float*>(c.lse ? out[1] : nullptr);
        cuda::attention_fwd(ctx, bf16, a);
      });
}

}  // namespace

TEST_F(CudaBf16, AttentionForward) {
  for (const AttentionCase& c : half_cases()) check_half_fwd(c);
}

TEST_F(CudaBf16, AttentionForwardWithEarlierKeys) {
  for (const AttentionCase& c : with_more(cases::kv_cache_cases, {{{130, 1}, {70, 500}, 8, 2, 64}})) {
    if (c.dropout == 0) check_half_fwd(c);
  }
}

TEST_F(CudaBf16, AttentionBackward) {
  for (const AttentionCase& c : half_cases()) {
    HalfAttention in(c);
    const AttentionExtents e(in.args);
    const Half dout(in.n * in.ldq, 4, c.offset);
    Half out(in.n * in.ldq, 5, c.offset);  // what forward leaves
    std::vector<float> o(out.get<float>(), out.get<float>() + in.n * in.ldq), lse(static_cast<size_t>(e.lse) + 1);
    ref::attention_fwd<float>(in.args, in.q.get<float>(), in.k.get<float>(), in.v.get<float>(), o.data(), lse.data());
    for (size_t i = 0; i < o.size(); i++) out.set(static_cast<int64_t>(i), o[i]);
    in.args.lse = lse.data();
    const AttentionBwdArgs b{.fwd = in.args, .lddout = in.ldq, .lddq = in.ldq, .lddk = in.ldkv, .lddv = in.ldkv};
    check_bf16(
        "attention_bwd " + c.name(), c.offset, {set_half("dq", e.q), set_half("dk", e.k), set_half("dv", e.v)},
        [&]<class T>(T** d) {
          for (int64_t r = 0; r < in.n; r++) {
            std::fill_n(d[0] + r * in.ldq, c.n_head * c.d_head, T{0});
            std::fill_n(d[1] + r * in.ldkv, c.n_kv_head * c.d_head, T{0});
            std::fill_n(d[2] + r * in.ldkv, c.n_kv_head * c.d_head, T{0});
          }
          ref::attention_bwd<T, T>(b, in.q.get<T>(), in.k.get<T>(), in.v.get<T>(), dout.get<T>(), d[0], d[1], d[2]);
        },
        [&](const cuda::Context& ctx, Staging& s, void** d) {
          cuda::AttentionBwd a = bwd_on_gpu(s, b, in.q.h(), in.k.h(), in.v.h(), out.h(), dout.h());
          a.dq = d[0], a.dk = d[1], a.dv = d[2];
          cuda::attention_bwd(ctx, bf16, a);
        });
  }
}

}  // namespace mm
#endif
