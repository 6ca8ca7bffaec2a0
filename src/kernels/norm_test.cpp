#include "kernels/cases/check_op.h"
#include "kernels/cases/norm_cases.h"
#include "kernels/ref/ref_ops.h"

namespace mm {

using cases::added_output, cases::Bits, cases::check_op, cases::cpu_and_row_backends, cases::Input,
    cases::norm_rope_cases, cases::NormRopeCase, cases::Output, cases::rmsnorm_cases, cases::RmsnormCase,
    cases::set_output;

using Rmsnorm = cases::KernelTest;
using QkNormRope = cases::KernelTest;

constexpr float eps = 1e-6f;

TEST_F(Rmsnorm, Forward) {
  for (const RmsnormCase& c : rmsnorm_cases) {
    const Input x(c.n * c.d, 1, c.offset, c.scale), w(c.d, 2, c.offset);
    check_op(
        c.name(), c.offset, {set_output("y", c.n * c.d, c.floor_y()), set_output("rstd", c.n, c.floor_rstd())},
        [&]<class T>(T** out) { ref::rmsnorm_fwd<T, T>(out[0], out[1], x.get<T>(), w.get<T>(), eps, c.n, c.d); },
        [&](const KernelTable& k, float** out) { k.rmsnorm_fwd(out[0], out[1], x.f(), w.f(), eps, c.n, c.d); },
        Bits::same, cpu_and_row_backends());
    check_op(
        "without rstd " + c.name(), c.offset, {set_output("y", c.n * c.d, c.floor_y())},
        [&]<class T>(T** out) { ref::rmsnorm_fwd<T, T>(out[0], nullptr, x.get<T>(), w.get<T>(), eps, c.n, c.d); },
        [&](const KernelTable& k, float** out) { k.rmsnorm_fwd(out[0], nullptr, x.f(), w.f(), eps, c.n, c.d); },
        Bits::same, cpu_and_row_backends());
  }
}

TEST_F(Rmsnorm, Backward) {
  for (const RmsnormCase& c : rmsnorm_cases) {
    const Input x(c.n * c.d, 1, c.offset, c.scale), w(c.d, 2, c.offset), dy(c.n * c.d, 3, c.offset);
    Input rstd(c.n, 4, c.offset);
    for (int64_t t = 0; t < c.n; t++)
      rstd.set(t, static_cast<float>(ref::inv_rms<float, double>(x.f() + t * c.d, c.d, eps)));
    check_op(
        c.name(), c.offset, {added_output("dx", c.n * c.d, 5, c.floor_dx()), added_output("dw", c.d, 6, c.floor_dw())},
        [&]<class T>(T** out) {
          ref::rmsnorm_bwd<T, T>(out[0], out[1], dy.get<T>(), x.get<T>(), rstd.get<T>(), w.get<T>(), c.n, c.d);
        },
        [&](const KernelTable& k, float** out) {
          k.rmsnorm_bwd(out[0], out[1], dy.f(), x.f(), rstd.f(), w.f(), c.n, c.d);
        },
        Bits::same, cpu_and_row_backends());
  }
}

namespace {

constexpr int max_pos = 97;

struct NormRopeInputs {
  Input qkv, q_weight, k_weight, cos, sin;
  std::vector<int32_t> positions;
  std::vector<int64_t> slots;
  NormRopeArgs args;

  explicit NormRopeInputs(const NormRopeCase& c)
      : qkv(c.n * (c.n_head + 2 * c.n_kv_head) * c.d_head, 1, c.offset),
        q_weight(c.d_head, 2, c.offset),
        k_weight(c.d_head, 3, c.offset),
        cos(max_pos * c.d_head / 2, 4, c.offset),
        sin(max_pos * c.d_head / 2, 5, c.offset) {
    for (int64_t i = 0; i < max_pos * c.d_head / 2; i++) {  // any angle will do
      const double angle = 37.0 * static_cast<double>(i % 1013);
      cos.set(i, static_cast<float>(std::cos(angle)));
      sin.set(i, static_cast<float>(std::sin(angle)));
    }
    for (int64_t t = 0; t < c.n; t++) {
      positions.push_back(static_cast<int32_t>(t * 31 % max_pos));
      slots.push_back(2 * (c.n - 1 - t) + 1);  // backwards, every other row
    }
    args = {.q_weight = c.norm ? q_weight.f() : nullptr,
            .k_weight = c.norm ? k_weight.f() : nullptr,
            .cos = cos.f(),
            .sin = sin.f(),
            .positions = positions.data(),
            .eps = eps,
            .n = c.n,
            .n_head = c.n_head,
            .n_kv_head = c.n_kv_head,
            .d_head = c.d_head};
  }
};

}  // namespace

TEST_F(QkNormRope, Forward) {
  for (const NormRopeCase& c : norm_rope_cases) {
    const NormRopeInputs in(c);
    const int64_t rows = c.slots ? 2 * c.n : c.n, ld = c.n_kv_head * c.d_head + c.pad;
    const int64_t* slots = c.slots ? in.slots.data() : nullptr;
    check_op(
        c.name(), c.offset,
        {set_output("q", c.n * c.n_head * c.d_head, c.floor_y()), set_output("k", rows * ld, c.floor_y()),
         set_output("v", rows * ld, 0)},
        [&]<class T>(T** out) {
          ref::qk_norm_rope_fwd<T, T>(out[0], out[1], ld, out[2], ld, slots, in.qkv.get<T>(),
                                      c.norm ? in.q_weight.get<T>() : nullptr, c.norm ? in.k_weight.get<T>() : nullptr,
                                      in.args);
        },
        [&](const KernelTable& k, float** out) {
          k.qk_norm_rope_fwd(out[0], out[1], ld, out[2], ld, slots, in.qkv.f(), in.args);
        });
  }
}

TEST_F(QkNormRope, ForwardWithoutV) {
  const NormRopeCase c{13, 4, 2, 32};
  const NormRopeInputs in(c);
  const int64_t ld = c.n_kv_head * c.d_head;
  check_op(
      c.name(), c.offset,
      {set_output("q", c.n * c.n_head * c.d_head, c.floor_y()), set_output("k", c.n * ld, c.floor_y())},
      [&]<class T>(T** out) {
        ref::qk_norm_rope_fwd<T, T>(out[0], out[1], ld, nullptr, 0, nullptr, in.qkv.get<T>(), in.q_weight.get<T>(),
                                    in.k_weight.get<T>(), in.args);
      },
      [&](const KernelTable& k, float** out) {
        k.qk_norm_rope_fwd(out[0], out[1], ld, nullptr, 0, nullptr, in.qkv.f(), in.args);
      });
}

TEST_F(QkNormRope, Backward) {
  for (const NormRopeCase& c : norm_rope_cases) {
    const NormRopeInputs in(c);
    const int64_t size = c.n * (c.n_head + 2 * c.n_kv_head) * c.d_head;
    std::vector<Output> outputs{added_output("dqkv", size, 6, c.floor_dx())};  // in place, its v part stays
    if (c.norm) {
      outputs.push_back(added_output("dq_weight", c.d_head, 7, c.floor_dw()));
      outputs.push_back(added_output("dk_weight", c.d_head, 8, c.floor_dw()));
    }
    check_op(
        c.name(), c.offset, outputs,
        [&]<class T>(T** out) {
          ref::qk_norm_rope_bwd<T, T>(out[0], c.norm ? out[1] : nullptr, c.norm ? out[2] : nullptr, in.qkv.get<T>(),
                                      c.norm ? in.q_weight.get<T>() : nullptr, c.norm ? in.k_weight.get<T>() : nullptr,
                                      in.args);
        },
        [&](const KernelTable& k, float** out) {
          k.qk_norm_rope_bwd(out[0], c.norm ? out[1] : nullptr, c.norm ? out[2] : nullptr, in.qkv.f(), in.args);
        });
  }
}

}  // namespace mm
