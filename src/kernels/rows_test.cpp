// Ops on rows and flat vectors.
#include "kernels/cases/check_op.h"
#include "kernels/cases/row_cases.h"
#include "kernels/ref/ref_ops.h"

namespace mm {

using cases::added_output, cases::Bits, cases::check_op, cases::cpu_and_row_backends, cases::Input, cases::LogprobCase,
    cases::Output, cases::RowsCase, cases::set_output, cases::SwigluCase, cases::VectorCase;

using Swiglu = cases::KernelTest;
using Logprob = cases::KernelTest;
using Rows = cases::KernelTest;
using Vectors = cases::KernelTest;

TEST_F(Swiglu, Forward) {
  for (const SwigluCase& c : cases::swiglu_cases) {
    const Input gate_up(c.n * 2 * c.f, 1, c.offset, c.scale);
    check_op(
        c.name(), c.offset, {set_output("act", c.n * c.f, c.floor())},
        [&]<class T>(T** out) { ref::swiglu_fwd<T, T>(out[0], gate_up.get<T>(), c.n, c.f); },
        [&](const KernelTable& k, float** out) { k.swiglu_fwd(out[0], gate_up.f(), c.n, c.f); }, Bits::same,
        cpu_and_row_backends());
  }
}

TEST_F(Swiglu, Backward) {
  for (const SwigluCase& c : cases::swiglu_cases) {
    const Input gate_up(c.n * 2 * c.f, 1, c.offset, c.scale), dact(c.n * c.f, 2, c.offset);
    check_op(
        c.name(), c.offset, {set_output("dgate_up", c.n * 2 * c.f, c.floor())},
        [&]<class T>(T** out) { ref::swiglu_bwd<T, T>(out[0], dact.get<T>(), gate_up.get<T>(), c.n, c.f); },
        [&](const KernelTable& k, float** out) { k.swiglu_bwd(out[0], dact.f(), gate_up.f(), c.n, c.f); }, Bits::same,
        cpu_and_row_backends());
    Output in_place = set_output("dgate_up = gate_up", c.n * 2 * c.f, c.floor());
    std::copy_n(gate_up.f(), in_place.init.size(), in_place.init.begin());
    check_op(
        "in place " + c.name(), c.offset, {in_place},
        [&]<class T>(T** out) { ref::swiglu_bwd<T, T>(out[0], dact.get<T>(), out[0], c.n, c.f); },
        [&](const KernelTable& k, float** out) { k.swiglu_bwd(out[0], dact.f(), out[0], c.n, c.f); }, Bits::same,
        cpu_and_row_backends());
  }
}

namespace {

struct LogprobInputs {
  Input logits;
  std::vector<int32_t> targets;
  explicit LogprobInputs(const LogprobCase& c) : logits(c.n * c.v, 1, c.offset, c.scale) {
    for (int64_t t = 0; t < c.n; t++) {
      targets.push_back(static_cast<int32_t>(t * 7919 % c.v));
      for (int64_t i = t * c.v; c.sure && i < (t + 1) * c.v; i++) logits.set(i, logits.f()[i] + 64.0f);
      if (c.sure) logits.set(t * c.v + targets.back(), 69.1f + 5.7f * c.scale);
    }
  }
};

}  // namespace

TEST_F(Logprob, Forward) {
  for (const LogprobCase& c : cases::logprob_cases) {
    const LogprobInputs in(c);
    check_op(
        c.name(), c.offset, {set_output("logp", c.n, c.floor_logp()), set_output("lse", c.n, c.floor_lse())},
        [&]<class T>(T** out) {
          ref::logprob_fwd<T, T>(out[0], out[1], in.logits.get<T>(), in.targets.data(), c.n, c.v);
        },
        [&](const KernelTable& k, float** out) {
          k.logprob_fwd(out[0], out[1], in.logits.f(), in.targets.data(), c.n, c.v);
        },
        Bits::same, cpu_and_row_backends());
  }
}

TEST_F(Logprob, Backward) {
  for (const LogprobCase& c : cases::logprob_cases) {
    const LogprobInputs in(c);
    const Input g(c.n, 2, c.offset);
    Input lse(c.n, 3, c.offset);
    for (int64_t t = 0; t < c.n; t++) {
      double logp = 0, l = 0;
      ref::logprob_fwd<double>(&logp, &l, in.logits.get<double>() + t * c.v, &in.targets[static_cast<size_t>(t)], 1,
                               c.v);
      lse.set(t, static_cast<float>(l));
    }
    Output logits = set_output("dlogits", c.n * c.v, c.floor_grad());
    std::copy_n(in.logits.f(), logits.init.size(), logits.init.begin());
    check_op(
        c.name(), c.offset, {logits},
        [&]<class T>(T** out) {
          ref::logprob_bwd<T, T>(out[0], lse.get<T>(), g.get<T>(), in.targets.data(), c.n, c.v);
        },
        [&](const KernelTable& k, float** out) { k.logprob_bwd(out[0], lse.f(), g.f(), in.targets.data(), c.n, c.v); },
        Bits::same, cpu_and_row_backends());
  }
}

TEST_F(Rows, EmbedGatherScatter) {
  for (const RowsCase& c : cases::rows_cases) {
    const Input table(c.n_table * c.d, 1, c.offset), x(c.n * c.d, 2, c.offset);
    std::vector<int32_t> ids, distinct;
    for (int64_t t = 0; t < c.n; t++) ids.push_back(static_cast<int32_t>(t * t * 31 % c.n_table));
    for (int64_t t = 0; t < std::min(c.n, c.n_table); t++) distinct.push_back(static_cast<int32_t>(c.n_table - 1 - t));
    const auto n_distinct = static_cast<int64_t>(distinct.size());
    check_op(
        "gather " + c.name(), c.offset, {set_output("out", c.n * c.d, 0), set_output("embedded", c.n * c.d, 0)},
        [&]<class T>(T** out) {
          ref::gather_rows(out[0], table.get<T>(), ids.data(), c.n, c.d);
          ref::embed_fwd(out[1], table.get<T>(), ids.data(), c.n, c.d);
        },
        [&](const KernelTable& k, float** out) {
          k.gather_rows(out[0], table.f(), ids.data(), c.n, c.d);
          k.embed_fwd(out[1], table.f(), ids.data(), c.n, c.d);
        });
    check_op(
        "scatter " + c.name(), c.offset, {set_output("out", c.n_table * c.d, 0)},
        [&]<class T>(T** out) { ref::scatter_rows(out[0], x.get<T>(), distinct.data(), n_distinct, c.d); },
        [&](const KernelTable& k, float** out) { k.scatter_rows(out[0], x.f(), distinct.data(), n_distinct, c.d); });
    check_op(
        "embed_bwd " + c.name(), c.offset, {added_output("dtable", c.n_table * c.d, 3, 0)},
        [&]<class T>(T** out) { ref::embed_bwd(out[0], x.get<T>(), ids.data(), c.n, c.d); },
        [&](const KernelTable& k, float** out) { k.embed_bwd(out[0], x.f(), ids.data(), c.n, c.d); });
  }
}

TEST_F(Vectors, Dropout) {
  for (const VectorCase& c : cases::vector_cases) {
    for (const float p : {0.1f, 0.9f}) {
      // One rounding of 1 / (1 - p), one of the product.
      check_op(
          c.name(), c.offset, {added_output("x", c.n, 1, cases::rounding(4 / (1 - static_cast<double>(p))))},
          [&]<class T>(T** out) { ref::dropout(out[0], p, 11, 5, c.n); },
          [&](const KernelTable& k, float** out) { k.dropout(out[0], p, 11, 5, c.n); });
    }
  }
}

TEST_F(Vectors, DropoutDropsTheShareAskedFor) {
  const int64_t n = 200000;
  std::vector<float> x(static_cast<size_t>(n), 1.0f);
  cpu_kernels().dropout(x.data(), 0.3f, 1, 2, n);
  int64_t dropped = 0;
  for (const float v : x) {
    dropped += v == 0.0f;
    ASSERT_TRUE(v == 0.0f || v == 1.0f / (1.0f - 0.3f));
  }
  EXPECT_NEAR(static_cast<double>(dropped), 0.3 * n, 5 * std::sqrt(0.21 * n));  // five standard deviations
}

TEST_F(Vectors, AddCopyZero) {
  for (const VectorCase& c : cases::vector_cases) {
    const Input x(c.n, 1, c.offset);
    check_op(
        c.name(), c.offset, {added_output("sum", c.n, 2, 0), set_output("copy", c.n, 0), set_output("zero", c.n, 0)},
        [&]<class T>(T** out) {
          ref::add(out[0], x.get<T>(), c.n);
          std::copy_n(x.get<T>(), c.n, out[1]);
          std::fill_n(out[2], c.n, T{0});
        },
        [&](const KernelTable& k, float** out) {
          k.add(out[0], x.f(), c.n);
          k.copy(out[1], x.f(), c.n);
          k.zero(out[2], c.n);
        });
  }
}

// Double sums: the order matters only in the last digits of a double, and is fixed.
TEST_F(Vectors, SumOfSquares) {
  for (const VectorCase& c : cases::vector_cases) {
    for (const float scale : {1.0f, 1e30f, 1e-30f}) {  // squares beyond float's range
      const Input x(c.n, 1, c.offset, scale);
      const double exact = ref::sum_sq(x.get<double>(), c.n);
      double one_thread = 0;
      for (const cases::Backend& b : cpu_and_row_backends()) {
        if (b.float_squares && scale != 1.0f) continue;
        set_num_threads(b.threads);
        const double got = b.kernels.sum_sq(x.f(), c.n);
        set_num_threads(0);
        const double relative = b.float_squares ? 16 * cases::half_ulp : 1e-13;  // sums of 16 squares in float
        EXPECT_NEAR(got, exact, relative * exact) << c.name() << " on " << b.name;
        if (b.name != cases::cpu_backends().front().name) continue;
        if (b.threads == 1) one_thread = got;
        EXPECT_EQ(got, one_thread) << c.name() << " with " << b.threads << " threads";
      }
    }
  }
}

}  // namespace mm
