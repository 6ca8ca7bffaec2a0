#include "kernels/cases/check_op.h"
#include "kernels/cases/moe_cases.h"
#include "kernels/ref/ref_ops.h"

namespace mm {

using cases::added_output, cases::check_op, cases::Guarded, cases::Input, cases::moe_cases, cases::MoeCase,
    cases::set_output;

using Moe = cases::KernelTest;

namespace {

struct MoeInputs {
  Input logits, y, weights, dout, dweights, daux;
  std::vector<int32_t> slot;  // a permutation of the n top_k rows of y

  explicit MoeInputs(const MoeCase& c)
      : logits(c.n * c.n_expert, 1, c.offset),
        y(c.n * c.top_k * c.d, 2, c.offset),
        weights(c.n * c.top_k, 3, c.offset),
        dout(c.n * c.d, 4, c.offset),
        dweights(c.n * c.top_k, 5, c.offset),
        daux(c.n_expert, 6, c.offset) {
    for (int64_t t = 0; c.unused >= 0 && t < c.n; t++) logits.set(t * c.n_expert + c.unused, -20.0f);
    const int64_t rows = c.n * c.top_k;
    for (int64_t i = 0; i < rows; i++) slot.push_back(static_cast<int32_t>(rows - 1 - i));
    for (int64_t i = 0; i + 3 < rows; i += 5) std::swap(slot[static_cast<size_t>(i)], slot[static_cast<size_t>(i + 3)]);
  }
};

// What forward of double finds, rounded once: scores and the chosen experts.
struct Routed {
  Input scores;
  std::vector<int32_t> experts;
  Routed(const MoeCase& c, const MoeInputs& in)
      : scores(c.n * c.n_expert, 7, c.offset), experts(static_cast<size_t>(c.n * c.top_k)) {
    std::vector<double> p(static_cast<size_t>(c.n * c.n_expert)), w(static_cast<size_t>(c.n * c.top_k));
    ref::moe_route_fwd<double>(p.data(), experts.data(), w.data(), in.logits.get<double>(), c.n, c.n_expert, c.top_k,
                               c.norm);
    for (size_t i = 0; i < p.size(); i++) scores.set(static_cast<int64_t>(i), static_cast<float>(p[i]));
  }
};

}  // namespace

TEST_F(Moe, RouteForward) {
  for (const MoeCase& c : moe_cases) {
    const MoeInputs in(c);
    const Routed routed(c, in);
    check_op(
        c.name(), c.offset,
        {set_output("scores", c.n * c.n_expert, c.floor_scores()),
         set_output("weights", c.n * c.top_k, c.floor_scores())},
        [&]<class T>(T** out) {
          std::vector<int32_t> experts(routed.experts.size());
          ref::moe_route_fwd<T, T>(out[0], experts.data(), out[1], in.logits.get<T>(), c.n, c.n_expert, c.top_k,
                                   c.norm);
          EXPECT_EQ(experts, routed.experts);
        },
        [&](const KernelTable& k, float** out) {
          Guarded<int32_t> experts(routed.experts.size(), c.offset);
          k.moe_route_fwd(out[0], experts.data(), out[1], in.logits.f(), c.n, c.n_expert, c.top_k, c.norm);
          EXPECT_TRUE(experts.intact());
          EXPECT_TRUE(std::equal(routed.experts.begin(), routed.experts.end(), experts.data()));
        });
    for (const int32_t e : routed.experts) EXPECT_NE(e, c.unused);
  }
}

TEST_F(Moe, TiesGoToTheLowerExpert) {
  const std::vector<float> logits{1, 2, 2, 2, 0, 0, 0, 0};
  for (const KernelTable* k : {&cpu_kernels(), &ref_kernels()}) {
    std::vector<float> scores(8), weights(4);
    std::vector<int32_t> experts(4);
    k->moe_route_fwd(scores.data(), experts.data(), weights.data(), logits.data(), 2, 4, 2, true);
    EXPECT_EQ(experts, (std::vector<int32_t>{1, 2, 0, 1}));
    EXPECT_EQ(weights, (std::vector<float>{0.5f, 0.5f, 0.5f, 0.5f}));
  }
}

TEST_F(Moe, RouteBackward) {
  for (const MoeCase& c : moe_cases) {
    const MoeInputs in(c);
    const Routed routed(c, in);
    check_op(
        c.name(), c.offset, {set_output("dlogits", c.n * c.n_expert, c.floor_dlogits())},
        [&]<class T>(T** out) {
          ref::moe_route_bwd<T, T>(out[0], in.dweights.get<T>(), in.daux.get<T>(), routed.scores.get<T>(),
                                   routed.experts.data(), c.n, c.n_expert, c.top_k, c.norm);
        },
        [&](const KernelTable& k, float** out) {
          k.moe_route_bwd(out[0], in.dweights.f(), in.daux.f(), routed.scores.f(), routed.experts.data(), c.n,
                          c.n_expert, c.top_k, c.norm);
        });
  }
}

TEST_F(Moe, Combine) {
  for (const MoeCase& c : moe_cases) {
    const MoeInputs in(c);
    const int64_t rows = c.n * c.top_k;
    check_op(
        c.name(), c.offset, {added_output("out", c.n * c.d, 8, c.floor_out())},
        [&]<class T>(T** out) {
          ref::moe_combine_fwd(out[0], in.y.get<T>(), in.slot.data(), in.weights.get<T>(), c.n, c.top_k, c.d);
        },
        [&](const KernelTable& k, float** out) {
          k.moe_combine_fwd(out[0], in.y.f(), in.slot.data(), in.weights.f(), c.n, c.top_k, c.d);
        });
    check_op(
        c.name(), c.offset,
        {set_output("dy", rows * c.d, c.floor_out()), set_output("dweights", rows, c.floor_dweights())},
        [&]<class T>(T** out) {
          ref::moe_combine_bwd<T, T>(out[0], out[1], in.dout.get<T>(), in.y.get<T>(), in.slot.data(),
                                     in.weights.get<T>(), c.n, c.top_k, c.d);
        },
        [&](const KernelTable& k, float** out) {
          k.moe_combine_bwd(out[0], out[1], in.dout.f(), in.y.f(), in.slot.data(), in.weights.f(), c.n, c.top_k, c.d);
        });
    check_op(
        c.name(), c.offset, {set_output("out", c.n * c.d, c.floor_out())},
        [&]<class T>(T** out) { ref::scatter_add<T, T>(out[0], in.y.get<T>(), in.slot.data(), c.n, c.top_k, c.d); },
        [&](const KernelTable& k, float** out) { k.scatter_add(out[0], in.y.f(), in.slot.data(), c.n, c.top_k, c.d); });
  }
}

}  // namespace mm
