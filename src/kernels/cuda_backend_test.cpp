// The CUDA kernels in fp32 as a backend of the shared kernel tests.
#ifdef MM_CUDA
#include "kernels/cases/cuda_backend.h"

#include "kernels/cases/check_op.h"
#include "kernels/cases/cuda_staging.h"

namespace mm {

namespace {

using namespace cases::staging;  // NOLINT(google-build-using-namespace)

// --- matrix products ----------------------------------------------------------------------------------------------
// cuBLASLt proposes algorithms for matrices that begin at multiples of 256 bytes, hence align(). The bf16 form takes
// rounded operands and keeps fp32 results.
const void* operand(Staging& s, const float* x, int64_t n, bool as_bf16) {
  const float* from = s.in(x, n);
  if (!as_bf16) return from;
  void* to = s.scratch(2 * static_cast<size_t>(n));
  cuda::cast(context(), bf16, to, f32, from, n);
  return to;
}

void linear_fwd(float* y, int64_t ldy, const float* x, int64_t ldx, const float* w, int64_t m, int64_t n, int64_t k,
                bool accumulate, bool as_bf16) {
  staged("linear_fwd", [&](Staging& s) {
    s.align();
    float* d = s.out(y, extent(m, ldy, n));
    const void *a = operand(s, x, extent(m, ldx, k), as_bf16), *b = operand(s, w, n * k, as_bf16);
    gpu().session.gemm().run({.m = m,
                              .n = n,
                              .k = k,
                              .lda = ldx,
                              .ldb = k,
                              .ldd = ldy,
                              .ldc = accumulate ? ldy : 0,
                              .trans_b = true,
                              .add_c = accumulate,
                              .in = as_bf16 ? bf16 : f32,
                              .out = f32},
                             d, a, b, accumulate ? d : nullptr);
  });
}

void linear_bwd(float* dx, int64_t lddx, float* dw, const float* dy, int64_t lddy, const float* x, int64_t ldx,
                const float* w, int64_t m, int64_t n, int64_t k, bool accumulate_dx, bool as_bf16) {
  staged("linear_bwd", [&](Staging& s) {
    s.align();
    const DType in = as_bf16 ? bf16 : f32;
    const void* g = operand(s, dy, extent(m, lddy, n), as_bf16);
    cuda::Gemm& gemm = gpu().session.gemm();
    if (dx != nullptr) {
      float* d = s.out(dx, extent(m, lddx, k));
      gemm.run({.m = m,
                .n = k,
                .k = n,
                .lda = lddy,
                .ldb = k,
                .ldd = lddx,
                .ldc = accumulate_dx ? lddx : 0,
                .add_c = accumulate_dx,
                .in = in,
                .out = f32},
               d, g, operand(s, w, n * k, as_bf16), accumulate_dx ? d : nullptr);
    }
    if (dw != nullptr && m > 0) {  // cuBLASLt has no products over nothing; no model asks for one
      float* d = s.out(dw, n * k);
      gemm.run({.m = n,
                .n = k,
                .k = m,
                .lda = lddy,
                .ldb = ldx,
                .ldd = k,
                .ldc = k,
                .trans_a = true,
                .add_c = true,
                .in = in,
                .out = f32},
               d, g, operand(s, x, extent(m, ldx, k), as_bf16), d);
    }
  });
}

// --- rows ---------------------------------------------------------------------------------------------------------
void embed_fwd(float* out, const float* table, const int32_t* ids, int64_t n, int64_t d) {
  staged("embed_fwd", [&](Staging& s) {
    cuda::embed_fwd(context(), f32, s.out(out, n * d), s.in(table, rows_of(ids, n) * d), s.in(ids, n), n, d);
  });
}

void embed_bwd(float* dtable, const float* dout, const int32_t* ids, int64_t n, int64_t d) {
  staged("embed_bwd", [&](Staging& s) {
    const int64_t rows = rows_of(ids, n);
    cuda::embed_bwd(context(), f32, s.out(dtable, rows * d), s.in(dout, n * d), s.in(ids, n), n, d, rows);
  });
}

void rmsnorm_fwd(float* y, float* rstd, const float* x, const float* w, float eps, int64_t n, int64_t d) {
  staged("rmsnorm_fwd", [&](Staging& s) {
    cuda::rmsnorm_fwd(context(), f32, s.out(y, n * d), s.out(rstd, n), s.in(x, n * d), s.in(w, d), eps, n, d);
  });
}

void rmsnorm_bwd(float* dx, float* dw, const float* dy, const float* x, const float* rstd, const float* w, int64_t n,
                 int64_t d) {
  staged("rmsnorm_bwd", [&](Staging& s) {
    cuda::rmsnorm_bwd(context(), f32, s.out(dx, n * d), s.out(dw, d), s.in(dy, n * d), s.in(x, n * d), s.in(rstd, n),
                      s.in(w, d), n, d);
  });
}

int64_t qkv_size(const NormRopeArgs& a) { return a.n * (a.n_head + 2 * a.n_kv_head) * a.d_head; }

void qk_norm_rope_fwd(float* q_out, float* k_out, int64_t ldk, float* v_out, int64_t ldv, const int64_t* slots,
                      const float* qkv, const NormRopeArgs& a) {
  staged("qk_norm_rope_fwd", [&](Staging& s) {
    const int64_t rows = slots != nullptr ? rows_of(slots, a.n) : a.n, width = int64_t{a.n_kv_head} * a.d_head;
    float* q = s.out(q_out, a.n * a.n_head * a.d_head);
    float* k = s.out(k_out, extent(rows, ldk, width));
    float* v = s.out(v_out, extent(rows, ldv, width));
    const int64_t* rows_to = s.in(slots, a.n);
    const float* x = s.in(qkv, qkv_size(a));
    cuda::qk_norm_rope_fwd(context(), f32, q, k, ldk, v, ldv, rows_to, x, on_gpu(s, a, a.q_weight, a.k_weight));
  });
}

void qk_norm_rope_bwd(float* dqkv, float* dq_weight, float* dk_weight, const float* qkv, const NormRopeArgs& a) {
  staged("qk_norm_rope_bwd", [&](Staging& s) {
    float *d = s.out(dqkv, qkv_size(a)), *dq = s.out(dq_weight, a.d_head), *dk = s.out(dk_weight, a.d_head);
    const float* x = s.in(qkv, qkv_size(a));
    cuda::qk_norm_rope_bwd(context(), f32, d, dq, dk, x, on_gpu(s, a, a.q_weight, a.k_weight));
  });
}

void swiglu_fwd(float* act, const float* gate_up, int64_t n, int64_t f) {
  staged("swiglu_fwd",
         [&](Staging& s) { cuda::swiglu_fwd(context(), f32, s.out(act, n * f), s.in(gate_up, n * 2 * f), n, f); });
}

void swiglu_bwd(float* dgate_up, const float* dact, const float* gate_up, int64_t n, int64_t f) {
  staged("swiglu_bwd", [&](Staging& s) {
    float* d = s.out(dgate_up, n * 2 * f);
    const float* x = gate_up == dgate_up ? d : s.in(gate_up, n * 2 * f);
    cuda::swiglu_bwd(context(), f32, d, nullptr, s.in(dact, n * f), x, n, f);
  });
}

void logprob_fwd(float* logp, float* lse, const float* logits, const int32_t* targets, int64_t n, int64_t v) {
  staged("logprob_fwd", [&](Staging& s) {
    cuda::logprob_fwd(context(), f32, s.out(logp, n), s.out(lse, n), s.in(logits, n * v), s.in(targets, n), n, v);
  });
}

void logprob_bwd(float* logits, const float* lse, const float* g, const int32_t* targets, int64_t n, int64_t v) {
  staged("logprob_bwd", [&](Staging& s) {
    cuda::logprob_bwd(context(), f32, s.out(logits, n * v), s.in(lse, n), s.in(g, n), s.in(targets, n), n, v);
  });
}

void gather_rows(float* out, const float* x, const int32_t* rows, int64_t n, int64_t d) {
  staged("gather_rows", [&](Staging& s) {
    cuda::gather_rows(context(), f32, s.out(out, n * d), s.in(x, rows_of(rows, n) * d), s.in(rows, n), n, d);
  });
}

void scatter_rows(float* out, const float* x, const int32_t* rows, int64_t n, int64_t d) {
  staged("scatter_rows", [&](Staging& s) {
    cuda::scatter_rows(context(), f32, s.out(out, rows_of(rows, n) * d), s.in(x, n * d), s.in(rows, n), n, d);
  });
}

// --- attention ----------------------------------------------------------------------------------------------------
void attention_fwd(const AttentionArgs& a) {
  staged("attention_fwd", [&](Staging& s) {
    const AttentionExtents e(a);
    cuda::Attention r = lists_on_gpu(s, a);
    r.q = s.in(a.q, e.q), r.k = s.in(a.k, e.k), r.v = s.in(a.v, e.v);
    r.out = s.out(a.out, e.out), r.lse = s.out(a.lse, e.lse);
    cuda::attention_fwd(context(), f32, r);
  });
}

void attention_bwd(const AttentionBwdArgs& b) {
  staged("attention_bwd", [&](Staging& s) {
    const AttentionArgs& a = b.fwd;
    const int64_t n = rows_of_queries(a), width = int64_t{a.n_head} * a.d_head,
                  kv_width = int64_t{a.n_kv_head} * a.d_head;
    cuda::AttentionBwd r = bwd_on_gpu(s, b, a.q, a.k, a.v, a.out, b.dout);
    r.dq = s.out(b.dq, extent(n, b.lddq, width));
    r.dk = s.out(b.dk, extent(n, b.lddk, kv_width));
    r.dv = s.out(b.dv, extent(n, b.lddv, kv_width));
    cuda::attention_bwd(context(), f32, r);
  });
}

// --- mixture of experts -------------------------------------------------------------------------------------------
void moe_route_fwd(float* scores, int32_t* experts, float* weights, const float* logits, int64_t n, int n_expert,
                   int top_k, bool norm) {
  staged("moe_route_fwd", [&](Staging& s) {
    cuda::moe_route_fwd(context(), f32, s.out(scores, n * n_expert), s.out(experts, n * top_k),
                        s.out(weights, n * top_k), s.in(logits, n * n_expert), n, n_expert, top_k, norm);
  });
}

void moe_route_bwd(float* dlogits, const float* dweights, const float* daux, const float* scores,
                   const int32_t* experts, int64_t n, int n_expert, int top_k, bool norm) {
  staged("moe_route_bwd", [&](Staging& s) {
    cuda::moe_route_bwd(context(), f32, s.out(dlogits, n * n_expert), s.in(dweights, n * top_k), s.in(daux, n_expert),
                        s.in(scores, n * n_expert), s.in(experts, n * top_k), n, n_expert, top_k, norm);
  });
}

void moe_combine_fwd(float* out, const float* y, const int32_t* slot, const float* weights, int64_t n, int top_k,
                     int64_t d) {
  staged("moe_combine_fwd", [&](Staging& s) {
    const int64_t pairs = n * top_k;
    cuda::moe_combine_fwd(context(), f32, s.out(out, n * d), s.in(y, rows_of(slot, pairs) * d), s.in(slot, pairs),
                          s.in(weights, pairs), n, top_k, d);
  });
}

void moe_combine_bwd(float* dy, float* dweights, const float* dout, const float* y, const int32_t* slot,
                     const float* weights, int64_t n, int top_k, int64_t d) {
  staged("moe_combine_bwd", [&](Staging& s) {
    const int64_t pairs = n * top_k, size = rows_of(slot, pairs) * d;
    cuda::moe_combine_bwd(context(), f32, s.out(dy, size), s.out(dweights, pairs), s.in(dout, n * d), s.in(y, size),
                          s.in(slot, pairs), s.in(weights, pairs), n, top_k, d);
  });
}

void scatter_add(float* out, const float* x, const int32_t* slot, int64_t n, int top_k, int64_t d) {
  staged("scatter_add", [&](Staging& s) {
    const int64_t pairs = n * top_k;
    cuda::scatter_add(context(), f32, s.out(out, n * d), s.in(x, rows_of(slot, pairs) * d), s.in(slot, pairs), n, top_k,
                      d);
  });
}

// --- vectors ------------------------------------------------------------------------------------------------------
void dropout(float* x, float p, uint64_t seed, uint64_t stream, int64_t n) {
  staged("dropout", [&](Staging& s) { cuda::dropout(context(), f32, s.out(x, n), p, seed, stream, n); });
}

void add(float* y, const float* x, int64_t n) {
  staged("add", [&](Staging& s) { cuda::add(context(), f32, s.out(y, n), s.in(x, n), n); });
}

void copy(float* y, const float* x, int64_t n) {
  staged("copy", [&](Staging& s) { cuda::copy(context(), f32, s.out(y, n), s.in(x, n), n); });
}

void zero(float* x, int64_t n) {
  staged("zero", [&](Staging& s) { cuda::zero(context(), s.out(x, n), static_cast<size_t>(n) * sizeof(float)); });
}

double sum_sq(const float* x, int64_t n) {
  double sum = -1;
  staged("sum_sq", [&](Staging& s) { cuda::sum_sq(context(), s.out(&sum, 1), s.in(x, n), n); });
  return sum;
}

// The gradients' scale as the clipping that comes to it: max_norm / (norm + 1e-6), for scales up to 1.
void adamw(float* p, const float* g, float* m, float* v, const AdamWArgs& a, int64_t n) {
  cuda::AdamWState state{.lr = static_cast<float>(a.lr),
                         .max_norm = a.grad_scale,
                         .inv_scale = 1.0f,
                         .sum_sq = (1 - 1e-6) * (1 - 1e-6),
                         .update_count = static_cast<int32_t>(a.step - 1)};
  staged("adamw", [&](Staging& s) {
    float* to = s.out(p, n);
    const float* from = s.in(g, n);
    float *first = s.out(m, n), *second = s.out(v, n);
    cuda::adamw(context(), f32, nullptr, to, from, first, second, s.out(&state, 1),
                {.beta1 = a.beta1, .beta2 = a.beta2, .eps = a.eps, .weight_decay = a.weight_decay}, n);
  });
  EXPECT_EQ(state.update_count, a.step) << "adamw";
}

}  // namespace

const KernelTable* cases::cuda_kernels() {
  static const KernelTable table{.linear_fwd = linear_fwd,
                                 .linear_bwd = linear_bwd,
                                 .embed_fwd = embed_fwd,
                                 .embed_bwd = embed_bwd,
                                 .rmsnorm_fwd = rmsnorm_fwd,
                                 .rmsnorm_bwd = rmsnorm_bwd,
                                 .qk_norm_rope_fwd = qk_norm_rope_fwd,
                                 .qk_norm_rope_bwd = qk_norm_rope_bwd,
                                 .attention_fwd = attention_fwd,
                                 .attention_bwd = attention_bwd,
                                 .swiglu_fwd = swiglu_fwd,
                                 .swiglu_bwd = swiglu_bwd,
                                 .logprob_fwd = logprob_fwd,
                                 .logprob_bwd = logprob_bwd,
                                 .dropout = dropout,
                                 .add = add,
                                 .moe_route_fwd = moe_route_fwd,
                                 .moe_route_bwd = moe_route_bwd,
                                 .gather_rows = gather_rows,
                                 .scatter_rows = scatter_rows,
                                 .moe_combine_fwd = moe_combine_fwd,
                                 .moe_combine_bwd = moe_combine_bwd,
                                 .scatter_add = scatter_add,
                                 .adamw = adamw,
                                 .copy = copy,
                                 .zero = zero,
                                 .sum_sq = sum_sq};
  return cuda_status().usable ? &table : nullptr;
}

using CudaBackend = cases::KernelTest;

// Says so when this folder's tests over cpu_backends() ran without a GPU.
TEST_F(CudaBackend, IsAmongTheBackends) {
  if (!cuda_status().usable) GTEST_SKIP() << "NOT TESTED: " << cuda_status().why_not;
  for (const auto* list : {&cases::cpu_backends(), &cases::cpu_and_row_backends()})
    EXPECT_TRUE(std::any_of(list->begin(), list->end(), [](const auto& b) { return b.name == "cuda"; }));
}

}  // namespace mm
#endif
