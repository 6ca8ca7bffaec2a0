#include "kernels/cases/attention_cases.h"

#include "kernels/cases/check_op.h"
#include "kernels/ref/ref_attention.h"

namespace mm {

using cases::attention_cases, cases::AttentionCase, cases::check_op, cases::Input, cases::kv_cache_cases, cases::Output,
    cases::set_output;

using Attention = cases::KernelTest;

namespace {

struct AttentionInputs {
  int64_t n = 0, n_kv = 0, ldq, ldkv;  // rows of q, rows of k and v
  std::vector<int32_t> cu{0}, kv_start, kv_len;
  Input q, k, v;
  AttentionArgs args;

  explicit AttentionInputs(const AttentionCase& c)
      : n(c.n()),
        n_kv(rows_of_keys(c)),
        ldq(c.n_head * c.d_head + c.pad),
        ldkv(c.n_kv_head * c.d_head + c.pad),
        q(n * ldq, 1, c.offset),
        k(n_kv * ldkv, 2, c.offset),
        v(n_kv * ldkv, 3, c.offset) {
    int64_t end = n_kv;  // the sequences' keys lie in the opposite order, with a row between them
    for (size_t s = 0; s < c.q_len.size(); s++) {
      cu.push_back(cu.back() + c.q_len[s]);
      if (c.past.empty()) continue;
      kv_len.push_back(c.past[s] + c.q_len[s]);
      end -= kv_len.back() + 1;
      kv_start.push_back(static_cast<int32_t>(end));
    }
    args = {.q = q.f(),
            .k = k.f(),
            .v = v.f(),
            .ldq = ldq,
            .ldk = ldkv,
            .ldv = ldkv,
            .ldo = ldq,
            .cu = cu.data(),
            .kv_start = c.past.empty() ? nullptr : kv_start.data(),
            .kv_len = c.past.empty() ? nullptr : kv_len.data(),
            .n_seq = static_cast<int64_t>(c.q_len.size()),
            .n_head = c.n_head,
            .n_kv_head = c.n_kv_head,
            .d_head = c.d_head,
            .scale = 1.0f / std::sqrt(static_cast<float>(c.d_head)),
            .dropout = c.dropout,
            .seed = 42,
            .stream = 3};
  }

  static int64_t rows_of_keys(const AttentionCase& c) {
    int64_t rows = c.n();
    for (const int32_t p : c.past) rows += p + 1;
    return rows;
  }
};

void check_fwd(const AttentionCase& c) {
  const AttentionInputs in(c);
  std::vector<Output> outputs{set_output("out", in.n * in.ldq, c.floor_out())};
  if (c.lse) outputs.push_back(set_output("lse", in.n * c.n_head, c.floor_lse()));
  check_op(
      c.name(), c.offset, outputs,
      [&]<class T>(T** out) {
        ref::attention_fwd<T, T>(in.args, in.q.get<T>(), in.k.get<T>(), in.v.get<T>(), out[0],
                                 c.lse ? out[1] : nullptr);
      },
      [&](const KernelTable& kernels, float** out) {
        AttentionArgs a = in.args;
        a.out = out[0];
        if (c.lse) a.lse = out[1];
        kernels.attention_fwd(a);
      });
}

template <class T>
void zero_rows(T* x, int64_t rows, int64_t cols, int64_t ld) {
  for (int64_t r = 0; r < rows; r++) std::fill_n(x + r * ld, cols, T{0});
}

}  // namespace

TEST_F(Attention, Forward) {
  for (const AttentionCase& c : attention_cases) check_fwd(c);
}

TEST_F(Attention, ForwardWithEarlierKeys) {
  for (const AttentionCase& c : kv_cache_cases) check_fwd(c);
}

TEST_F(Attention, Backward) {
  for (const AttentionCase& c : attention_cases) {
    const AttentionInputs in(c);
    const Input dout(in.n * in.ldq, 4, c.offset);
    // What forward leaves, to float precision.
    Input out(in.n * in.ldq, 5, c.offset), lse(in.n * c.n_head, 6, c.offset);
    std::vector<float> o(static_cast<size_t>(in.n * in.ldq)), l(static_cast<size_t>(in.n * c.n_head));
    ref::attention_fwd<float>(in.args, in.q.f(), in.k.f(), in.v.f(), o.data(), l.data());
    for (int64_t i = 0; i < in.n * in.ldq; i++) out.set(i, o[static_cast<size_t>(i)]);
    for (int64_t i = 0; i < in.n * c.n_head; i++) lse.set(i, l[static_cast<size_t>(i)]);
    AttentionBwdArgs b{
        .fwd = in.args, .dout = dout.f(), .lddout = in.ldq, .lddq = in.ldq, .lddk = in.ldkv, .lddv = in.ldkv};
    std::vector<float> out_copy(out.f(), out.f() + in.n * in.ldq), lse_copy(lse.f(), lse.f() + in.n * c.n_head);
    b.fwd.out = out_copy.data();
    b.fwd.lse = lse_copy.data();
    check_op(
        c.name(), c.offset,
        {set_output("dq", in.n * in.ldq, c.floor_grad()), set_output("dk", in.n * in.ldkv, c.floor_grad()),
         set_output("dv", in.n * in.ldkv, c.floor_grad())},
        [&]<class T>(T** d) {
          zero_rows(d[0], in.n, c.n_head * c.d_head, in.ldq);
          zero_rows(d[1], in.n, c.n_kv_head * c.d_head, in.ldkv);
          zero_rows(d[2], in.n, c.n_kv_head * c.d_head, in.ldkv);
          ref::attention_bwd<T, T>(b, in.q.get<T>(), in.k.get<T>(), in.v.get<T>(), dout.get<T>(), d[0], d[1], d[2]);
        },
        [&](const KernelTable& kernels, float** d) {
          AttentionBwdArgs args = b;
          args.dq = d[0], args.dk = d[1], args.dv = d[2];
          kernels.attention_bwd(args);
        });
  }
}

// A sequence's result does not depend on what it is packed with.
TEST_F(Attention, PackedIsAlone) {
  const AttentionCase packed{{37, 5, 64}, {}, 4, 2, 32};
  const AttentionInputs in(packed);
  const int64_t ld = in.ldq;
  std::vector<float> all(static_cast<size_t>(in.n * ld)), one(all.size());
  AttentionArgs a = in.args;
  a.out = all.data();
  cpu_kernels().attention_fwd(a);
  a.out = one.data();
  for (int s = 0; s < 3; s++) {
    a.cu = in.cu.data() + s;
    a.n_seq = 1;
    cpu_kernels().attention_fwd(a);
  }
  EXPECT_EQ(all, one);
}

}  // namespace mm
