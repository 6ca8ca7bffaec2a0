#include "kernels/ops.h"

#include "kernels/ops_detail.h"
#ifdef MM_CUDA
#include "kernels/cuda/hopper_gemm.h"
#endif

namespace mm::ops {

void linear_fwd(const Device& dev, View y, View x, View w, View residual) {
  const int64_t m = x.rows(), k = x.cols(), n = w.rows();
  check_2d(y, m, n, "y");
  check_dense(w, n, k, "w");
  const Zone zone(dev.profiler, "linear_fwd", moved({y, x, w, residual}), 2.0 * static_cast<double>(m * n * k));
  if (residual) check_2d(residual, m, n, "residual");
#ifdef MM_CUDA
  if (dev.kind == DeviceKind::cuda) {
    dev.cuda->gemm().run({.m = m,
                          .n = n,
                          .k = k,
                          .lda = x.ld,
                          .ldb = w.ld,
                          .ldd = y.ld,
                          .ldc = residual.ld,
                          .trans_b = true,
                          .add_c = static_cast<bool>(residual),
                          .in = x.dtype,
                          .out = y.dtype},
                         y.data, x.data, w.data, residual.data);
    return;
  }
#endif
  if (residual && residual.data != y.data) kernels(dev).copy(y.f32(), residual.f32(), y.numel());
  kernels(dev).linear_fwd(y.f32(), y.ld, x.f32(), x.ld, w.f32(), m, n, k, static_cast<bool>(residual), use_bf16(dev));
}

void linear_bwd(const Device& dev, View dx, View dw, View dy, View x, View w, bool accumulate_dx) {
  const int64_t m = dy.rows(), n = dy.cols(), k = w.cols();
  if (dw) check_2d(x, m, k, "x");
  check_dense(w, n, k, "w");
  if (dx) check_2d(dx, m, k, "dx");
  if (dw) check_dense(dw, n, k, "dw");
  const double products = (dx ? 1 : 0) + (dw ? 1 : 0);
  const Zone zone(dev.profiler, "linear_bwd", moved({dx, dw, dy, x, w}),
                  products * 2.0 * static_cast<double>(m * n * k));
#ifdef MM_CUDA
  if (dev.kind == DeviceKind::cuda) {
    cuda::Gemm& gemm = dev.cuda->gemm();
    if (dx) {
      gemm.run({.m = m,
                .n = k,
                .k = n,
                .lda = dy.ld,
                .ldb = w.ld,
                .ldd = dx.ld,
                .ldc = accumulate_dx ? dx.ld : 0,
                .add_c = accumulate_dx,
                .in = dy.dtype,
                .out = dx.dtype},
               dx.data, dy.data, w.data, dx.data);
    }
    if (dw) {
      gemm.run({.m = n,
                .n = k,
                .k = m,
                .lda = dy.ld,
                .ldb = x.ld,
                .ldd = dw.ld,
                .ldc = dw.ld,
                .trans_a = true,
                .add_c = true,
                .in = dy.dtype,
                .out = dw.dtype},
               dw.data, dy.data, x.data, dw.data);
    }
    return;
  }
#endif
  kernels(dev).linear_bwd(opt(dx), dx.ld, opt(dw), dy.f32(), dy.ld, opt(x), x.ld, w.f32(), m, n, k, accumulate_dx,
                          use_bf16(dev));
}

void embed_fwd(const Device& dev, View out, View table, const int32_t* ids) {
  check_dense(out, out.rows(), table.cols(), "out");
  const Zone zone(dev.profiler, "embed_fwd", 2 * moved({out}), 0);
  ON_CUDA(embed_fwd(gpu(dev), out.dtype, out.data, table.data, ids, out.rows(), out.cols()))
  kernels(dev).embed_fwd(out.f32(), table.f32(), ids, out.rows(), out.cols());
}

void embed_bwd(const Device& dev, View dtable, View dout, const int32_t* ids) {
  check_dense(dout, dout.rows(), dtable.cols(), "dout");
  const Zone zone(dev.profiler, "embed_bwd", 3 * moved({dout}), static_cast<double>(dout.numel()));
  ON_CUDA(embed_bwd(gpu(dev), dout.dtype, dtable.f32(), dout.data, ids, dout.rows(), dout.cols(), dtable.rows()))
  kernels(dev).embed_bwd(dtable.f32(), dout.f32(), ids, dout.rows(), dout.cols());
}

void rmsnorm_fwd(const Device& dev, View y, View rstd, View x, View w, float eps) {
  const int64_t n = x.rows(), d = x.cols();
  check_dense(x, n, d, "x");
  check_dense(y, n, d, "y");
  MM_CHECK(w.numel() == d && (!rstd || rstd.numel() == n));
  const Zone zone(dev.profiler, "rmsnorm_fwd", moved({y, x, w}), 4.0 * static_cast<double>(n * d));
  ON_CUDA(rmsnorm_fwd(gpu(dev), x.dtype, y.data, opt(rstd), x.data, w.data, eps, n, d))
  kernels(dev).rmsnorm_fwd(y.f32(), opt(rstd), x.f32(), w.f32(), eps, n, d);
}

void rmsnorm_bwd(const Device& dev, View dx, View dw, View dy, View x, View rstd, View w) {
  const int64_t n = x.rows(), d = x.cols();
  check_dense(dx, n, d, "dx");
  check_dense(dy, n, d, "dy");
  check_dense(x, n, d, "x");
  MM_CHECK(w.numel() == d && dw.numel() == d && rstd.numel() == n);
  const Zone zone(dev.profiler, "rmsnorm_bwd", moved({dx, dx, dy, x}), 10.0 * static_cast<double>(n * d));
  ON_CUDA(rmsnorm_bwd(gpu(dev), x.dtype, dx.data, dw.f32(), dy.data, x.data, rstd.f32(), w.data, n, d))
  kernels(dev).rmsnorm_bwd(dx.f32(), dw.f32(), dy.f32(), x.f32(), rstd.f32(), w.f32(), n, d);
}

static void check_norm_rope(const View& qkv, const NormRope& a) {
  check_dense(qkv, a.n, static_cast<int64_t>(a.n_head + 2 * a.n_kv_head) * a.d_head, "qkv");
  MM_CHECK(a.d_head % 2 == 0 && a.d_head <= 1024);
}

// The same fields for the kernels, which see raw pointers: Args of kernel_table.h or of cuda_kernels.h.
template <class Args>
static Args raw(const NormRope& a) {
  Args r;
  r.q_weight = static_cast<decltype(r.q_weight)>(a.q_weight.data);
  r.k_weight = static_cast<decltype(r.k_weight)>(a.k_weight.data);
  r.cos = a.cos;
  r.sin = a.sin;
  r.positions = a.positions;
  r.eps = a.eps;
  r.n = a.n;
  r.n_head = a.n_head;
  r.n_kv_head = a.n_kv_head;
  r.d_head = a.d_head;
  return r;
}

void qk_norm_rope_fwd(const Device& dev, View q, View k, View v, const int64_t* slots, View qkv, const NormRope& a) {
  check_norm_rope(qkv, a);
  check_dense(q, a.n, static_cast<int64_t>(a.n_head) * a.d_head, "q");
  MM_CHECK(k.cols() == static_cast<int64_t>(a.n_kv_head) * a.d_head && (!v || v.cols() == k.cols()));
  const Zone zone(dev.profiler, "qk_norm_rope_fwd", 2 * moved({qkv}), 8.0 * static_cast<double>(qkv.numel()));
  ON_CUDA(qk_norm_rope_fwd(gpu(dev), qkv.dtype, q.data, k.data, k.ld, v.data, v.ld, slots, qkv.data,
                           raw<cuda::NormRope>(a)))
  kernels(dev).qk_norm_rope_fwd(q.f32(), k.f32(), k.ld, opt(v), v.ld, slots, qkv.f32(), raw<NormRopeArgs>(a));
}

void qk_norm_rope_bwd(const Device& dev, View dqkv, View dq_weight, View dk_weight, View qkv, const NormRope& a) {
  check_norm_rope(qkv, a);
  check_norm_rope(dqkv, a);
  MM_CHECK(!a.q_weight == !dq_weight && !a.k_weight == !dk_weight);
  const Zone zone(dev.profiler, "qk_norm_rope_bwd", 3 * moved({qkv}), 16.0 * static_cast<double>(qkv.numel()));
  ON_CUDA(qk_norm_rope_bwd(gpu(dev), qkv.dtype, dqkv.data, opt(dq_weight), opt(dk_weight), qkv.data,
                           raw<cuda::NormRope>(a)))
  kernels(dev).qk_norm_rope_bwd(dqkv.f32(), opt(dq_weight), opt(dk_weight), qkv.f32(), raw<NormRopeArgs>(a));
}

static void check_attention(const Device& dev, const Attention& a) {
  MM_CHECK(a.n_kv_head > 0 && a.n_head % a.n_kv_head == 0 && a.dropout >= 0 && a.dropout < 1);
  if (dev.kind == DeviceKind::cuda) return;  // the lists lie on the GPU
  for (int64_t s = 0; s < a.n_seq; s++)
    MM_CHECK(a.cu[s] <= a.cu[s + 1] && (a.kv_len == nullptr || a.kv_len[s] >= a.cu[s + 1] - a.cu[s]));
}

template <class Args>
static Args raw(const Attention& a) {
  Args r;
  r.q = static_cast<decltype(r.q)>(a.q.data);
  r.k = static_cast<decltype(r.k)>(a.k.data);
  r.v = static_cast<decltype(r.v)>(a.v.data);
  r.out = static_cast<decltype(r.out)>(a.out.data);
  r.lse = opt(a.lse);
  r.ldq = a.q.ld;
  r.ldk = a.k.ld;
  r.ldv = a.v.ld;
  r.ldo = a.out.ld;
  r.cu = a.cu;
  r.kv_start = a.kv_start;
  r.kv_len = a.kv_len;
  r.n_seq = a.n_seq;
  r.n_head = a.n_head;
  r.n_kv_head = a.n_kv_head;
  r.d_head = a.d_head;
  r.scale = a.scale;
  r.dropout = a.dropout;
  r.seed = a.seed;
  r.stream = a.stream;
  return r;
}

#ifdef MM_CUDA
static cuda::Attention on_gpu(const Attention& a) {
  auto r = raw<cuda::Attention>(a);
  r.n_tok = a.n_tok;
  r.tiles = a.tiles;
  r.n_tiles = a.n_tiles;
  r.max_tiles = a.max_tiles;
  r.max_len = a.max_len;
  return r;
}
#endif

void attention_fwd(const Device& dev, const Attention& a) {
  check_attention(dev, a);
  const double n = static_cast<double>(a.n_tok), dh = a.d_head, size = static_cast<double>(dtype_size(a.q.dtype));
  const Zone zone(dev.profiler, "attention_fwd", size * dh * (2 * n * a.n_head + 2 * a.keys * a.n_kv_head),
                  4 * a.pairs * a.n_head * dh);
  ON_CUDA(attention_fwd(gpu(dev), a.q.dtype, on_gpu(a)))
  kernels(dev).attention_fwd(raw<AttentionArgs>(a));
}

void attention_bwd(const Device& dev, const Attention& a, View dout, View dq, View dk, View dv) {
  check_attention(dev, a);
  MM_CHECK(a.kv_start == nullptr && a.kv_len == nullptr && a.lse);
  const double n = static_cast<double>(a.n_tok), dh = a.d_head, size = static_cast<double>(dtype_size(a.q.dtype));
  const Zone zone(dev.profiler, "attention_bwd", size * dh * n * (4 * a.n_head + 4 * a.n_kv_head),
                  10 * a.pairs * a.n_head * dh);
  ON_CUDA(attention_bwd(gpu(dev), a.q.dtype,
                        {.fwd = on_gpu(a),
                         .dout = dout.data,
                         .dq = dq.data,
                         .dk = dk.data,
                         .dv = dv.data,
                         .lddout = dout.ld,
                         .lddq = dq.ld,
                         .lddk = dk.ld,
                         .lddv = dv.ld}))
  kernels(dev).attention_bwd({.fwd = raw<AttentionArgs>(a),
                              .dout = dout.f32(),
                              .dq = dq.f32(),
                              .dk = dk.f32(),
                              .dv = dv.f32(),
                              .lddout = dout.ld,
                              .lddq = dq.ld,
                              .lddk = dk.ld,
                              .lddv = dv.ld});
}

void swiglu_fwd(const Device& dev, View act, View gate_up) {
  check_dense(gate_up, act.rows(), 2 * act.cols(), "gate_up");
  check_dense(act, act.rows(), act.cols(), "act");
  const Zone zone(dev.profiler, "swiglu_fwd", moved({act, gate_up}), 20.0 * static_cast<double>(act.numel()));
  ON_CUDA(swiglu_fwd(gpu(dev), act.dtype, act.data, gate_up.data, act.rows(), act.cols()))
  kernels(dev).swiglu_fwd(act.f32(), gate_up.f32(), act.rows(), act.cols());
}

void linear_swiglu_fwd(const Device& dev, View gate_up, View act, View x, View w) {
#ifdef MM_CUDA
  if (dev.kind == DeviceKind::cuda && x.dtype == DType::bf16) {
    const int64_t m = x.rows(), k = x.cols(), n = w.rows();
    const cuda::HopperGemm g{.layout = cuda::GemmLayout::fwd,
                             .epilogue = cuda::GemmEpilogue::swiglu,
                             .a = x.data,
                             .b = w.data,
                             .out = gate_up.data,
                             .m = m,
                             .n = n,
                             .k = k,
                             .lda = x.ld,
                             .ldb = w.ld,
                             .ldo = gate_up.ld,
                             .act = act.data};
    // Few rows leave most of the machine idle either way; then the tuned product is the better half of it.
    if (m >= 1024 && cuda::hopper_gemm_fits(gpu(dev), g)) {
      check_dense(gate_up, m, n, "gate_up");
      check_dense(act, m, n / 2, "act");
      const Zone zone(dev.profiler, "linear_swiglu_fwd", moved({gate_up, act, x, w}),
                      2.0 * static_cast<double>(m * n * k));
      cuda::hopper_gemm(gpu(dev), g);
      return;
    }
  }
#endif
  linear_fwd(dev, gate_up, x, w);
  swiglu_fwd(dev, act, gate_up);
}

void linear_swiglu_bwd(const Device& dev, View dgate_up, View act, View dact, View dy, View w, View gate_up) {
#ifdef MM_CUDA
  if (dev.kind == DeviceKind::cuda && dy.dtype == DType::bf16) {
    const int64_t m = dy.rows(), k = dy.cols(), n = w.cols();
    const cuda::HopperGemm g{.layout = cuda::GemmLayout::dgrad,
                             .epilogue = cuda::GemmEpilogue::swiglu_bwd,
                             .a = dy.data,
                             .b = w.data,
                             .out = dgate_up.data,
                             .m = m,
                             .n = n,
                             .k = k,
                             .lda = dy.ld,
                             .ldb = w.ld,
                             .ldo = dgate_up.ld,
                             .residual = gate_up.data,
                             .ldr = gate_up.ld,
                             .act = act.data};
    if (m >= 1024 && cuda::hopper_gemm_fits(gpu(dev), g)) {
      check_dense(gate_up, m, 2 * n, "gate_up");
      check_dense(dgate_up, m, 2 * n, "dgate_up");
      check_dense(act, m, n, "act");
      const Zone zone(dev.profiler, "linear_swiglu_bwd", moved({dgate_up, gate_up, act, dy, w}),
                      2.0 * static_cast<double>(m * n * k));
      cuda::hopper_gemm(gpu(dev), g);
      return;
    }
  }
#endif
  linear_bwd(dev, dact, View(), dy, View(), w);
  swiglu_bwd(dev, dgate_up, act, dact, gate_up);
}

void swiglu_bwd(const Device& dev, View dgate_up, View act, View dact, View gate_up) {
  check_dense(dact, dact.rows(), dact.cols(), "dact");
  check_dense(act, dact.rows(), dact.cols(), "act");
  check_dense(gate_up, dact.rows(), 2 * dact.cols(), "gate_up");
  check_dense(dgate_up, dact.rows(), 2 * dact.cols(), "dgate_up");
  MM_CHECK(dgate_up.data != dact.data && act.data != dact.data);
  const Zone zone(dev.profiler, "swiglu_bwd", moved({dgate_up, act, dact, gate_up}),
                  30.0 * static_cast<double>(dact.numel()));
  ON_CUDA(swiglu_bwd(gpu(dev), dact.dtype, dgate_up.data, act.data, dact.data, gate_up.data, dact.rows(), dact.cols()))
  kernels(dev).swiglu_fwd(act.f32(), gate_up.f32(), act.rows(), act.cols());
  kernels(dev).swiglu_bwd(dgate_up.f32(), dact.f32(), gate_up.f32(), dact.rows(), dact.cols());
}

void logprob_fwd(const Device& dev, View logp, View lse, View logits, const int32_t* targets) {
  check_dense(logits, logp.numel(), logits.cols(), "logits");
  MM_CHECK(lse.numel() == logp.numel());
  const Zone zone(dev.profiler, "logprob_fwd", moved({logits}), 15.0 * static_cast<double>(logits.numel()));
  ON_CUDA(
      logprob_fwd(gpu(dev), logits.dtype, logp.f32(), lse.f32(), logits.data, targets, logits.rows(), logits.cols()))
  kernels(dev).logprob_fwd(logp.f32(), lse.f32(), logits.f32(), targets, logits.rows(), logits.cols());
}

void logprob_bwd(const Device& dev, View logits, View lse, View g, const int32_t* targets) {
  check_dense(logits, lse.numel(), logits.cols(), "logits");
  MM_CHECK(g.numel() == lse.numel());
  const Zone zone(dev.profiler, "logprob_bwd", 2 * moved({logits}), 15.0 * static_cast<double>(logits.numel()));
  ON_CUDA(logprob_bwd(gpu(dev), logits.dtype, logits.data, lse.f32(), g.f32(), targets, logits.rows(), logits.cols()))
  kernels(dev).logprob_bwd(logits.f32(), lse.f32(), g.f32(), targets, logits.rows(), logits.cols());
}

void logprob_fwd_bwd(const Device& dev, View logits, View logp, View lse, View g, const int32_t* targets) {
  check_dense(logits, logp.numel(), logits.cols(), "logits");
  MM_CHECK(lse.numel() == logp.numel() && g.numel() == logp.numel());
  const Zone zone(dev.profiler, "logprob_fwd_bwd", 2 * moved({logits}), 25.0 * static_cast<double>(logits.numel()));
  const int64_t n = logits.rows(), v = logits.cols();
  ON_CUDA(logprob_fwd_bwd(gpu(dev), logits.dtype, logits.data, logp.f32(), lse.f32(), g.f32(), targets, n, v))
  kernels(dev).logprob_fwd(logp.f32(), lse.f32(), logits.f32(), targets, n, v);
  kernels(dev).logprob_bwd(logits.f32(), lse.f32(), g.f32(), targets, n, v);
}

void weighted_nll(const Device& dev, View out, View logp, View w, bool accumulate) {
  MM_CHECK(out.numel() == 1 && w.numel() == logp.numel());
  const Zone zone(dev.profiler, "weighted_nll", moved({logp, w}), 2.0 * static_cast<double>(logp.numel()));
  auto* sum = out.as<double>();
  ON_CUDA(weighted_nll(gpu(dev), sum, logp.f32(), w.f32(), logp.numel(), accumulate))
  if (!accumulate) *sum = 0;
  for (int64_t t = 0; t < logp.numel(); t++) *sum -= static_cast<double>(w.f32()[t]) * logp.f32()[t];
}

void dropout(const Device& dev, View x, float p, uint64_t seed, uint64_t stream) {
  MM_CHECK(x.contiguous() && p > 0 && p < 1);
  const Zone zone(dev.profiler, "dropout", 2 * moved({x}), static_cast<double>(x.numel()));
  ON_CUDA(dropout(gpu(dev), x.dtype, x.data, p, seed, stream, x.numel()))
  kernels(dev).dropout(x.f32(), p, seed, stream, x.numel());
}

void add(const Device& dev, View y, View x) {
  MM_CHECK(x.contiguous() && y.contiguous() && x.numel() == y.numel());
  const Zone zone(dev.profiler, "add", moved({y, y, x}), static_cast<double>(x.numel()));
  ON_CUDA(add(gpu(dev), y.dtype, y.data, x.data, x.numel()))
  kernels(dev).add(y.f32(), x.f32(), x.numel());
}

void gather_rows(const Device& dev, View out, View x, const int32_t* rows) {
  check_dense(out, out.rows(), x.cols(), "out");
  const Zone zone(dev.profiler, "gather_rows", 2 * moved({out}), 0);
  ON_CUDA(gather_rows(gpu(dev), x.dtype, out.data, x.data, rows, out.rows(), out.cols()))
  kernels(dev).gather_rows(out.f32(), x.f32(), rows, out.rows(), out.cols());
}

void scatter_rows(const Device& dev, View out, View x, const int32_t* rows) {
  check_dense(x, x.rows(), out.cols(), "x");
  const Zone zone(dev.profiler, "scatter_rows", 2 * moved({x}), 0);
  ON_CUDA(scatter_rows(gpu(dev), x.dtype, out.data, x.data, rows, x.rows(), x.cols()))
  kernels(dev).scatter_rows(out.f32(), x.f32(), rows, x.rows(), x.cols());
}

void adamw(const Device& dev, View p, View g, View m, View v, const AdamWArgs& args) {
  MM_CHECK(p.numel() == g.numel() && p.numel() == m.numel() && p.numel() == v.numel() && args.step >= 1);
  const Zone zone(dev.profiler, "adamw", 7.0 * static_cast<double>(p.bytes()), 12.0 * static_cast<double>(p.numel()));
#ifdef MM_CUDA
  if (dev.kind == DeviceKind::cuda) {
    // The kernels read their numbers from the GPU (a graph is replayed with new ones); this form with the caller's
    // numbers puts them at the end of the scratch memory. The clipping that scales by grad_scale: max_norm / norm.
    const cuda::Context& ctx = gpu(dev);
    const cuda::AdamWState state{.lr = static_cast<float>(args.lr),
                                 .max_norm = args.grad_scale,
                                 .inv_scale = 1.0f,
                                 .sum_sq = (1 - 1e-6) * (1 - 1e-6),
                                 .update_count = static_cast<int32_t>(args.step - 1)};
    auto* at = reinterpret_cast<cuda::AdamWState*>(static_cast<char*>(ctx.scratch) + ctx.scratch_bytes - 256);
    copy_async(at, &state, sizeof(state), ctx.stream);
    cuda::adamw(ctx, DType::f32, nullptr, p.f32(), g.f32(), m.f32(), v.f32(), at,
                {.beta1 = args.beta1, .beta2 = args.beta2, .eps = args.eps, .weight_decay = args.weight_decay},
                p.numel());
    synchronize(ctx.stream);
    return;
  }
#endif
  kernels(dev).adamw(p.f32(), g.f32(), m.f32(), v.f32(), args, p.numel());
}

void copy(const Device& dev, View y, View x) {
  MM_CHECK(x.contiguous() && y.contiguous() && x.numel() == y.numel());
  const Zone zone(dev.profiler, "copy", moved({x, y}), 0);
  ON_CUDA(copy(gpu(dev), x.dtype, y.data, x.data, x.numel()))
  kernels(dev).copy(y.f32(), x.f32(), x.numel());
}

void cast(const Device& dev, View y, View x) {
  MM_CHECK(x.contiguous() && y.contiguous() && x.numel() == y.numel());
  const Zone zone(dev.profiler, "cast", moved({x, y}), 0);
  ON_CUDA(cast(gpu(dev), y.dtype, y.data, x.dtype, x.data, x.numel()))
  kernels(dev).copy(y.f32(), x.f32(), x.numel());
}

void zero(const Device& dev, View x) {
  MM_CHECK(x.contiguous());
  const Zone zone(dev.profiler, "zero", moved({x}), 0);
  ON_CUDA(zero(gpu(dev), x.data, x.bytes()))
  kernels(dev).zero(static_cast<float*>(x.data), static_cast<int64_t>(x.bytes() / sizeof(float)));
}

double sum_sq(const Device& dev, View x) {
  MM_CHECK(x.contiguous());
  const Zone zone(dev.profiler, "sum_sq", moved({x}), 2.0 * static_cast<double>(x.numel()));
#ifdef MM_CUDA
  if (dev.kind == DeviceKind::cuda) {
    const cuda::Context& ctx = gpu(dev);
    auto* at = reinterpret_cast<double*>(static_cast<char*>(ctx.scratch) + ctx.scratch_bytes - 256);
    cuda::sum_sq(ctx, at, x.f32(), x.numel());
    double sum = 0;
    copy_async(&sum, at, sizeof(sum), ctx.stream);
    synchronize(ctx.stream);
    return sum;
  }
#endif
  return kernels(dev).sum_sq(x.f32(), x.numel());
}

}  // namespace mm::ops
