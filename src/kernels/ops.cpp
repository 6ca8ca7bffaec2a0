#include "kernels/ops.h"

#include "base/error.h"
#include "prof/profiler.h"

namespace mm::ops {

static const KernelTable& kernels(const Device& dev) {
  switch (dev.kind) {
    case DeviceKind::ref: return ref_kernels();
    case DeviceKind::cpu: return cpu_kernels();
    case DeviceKind::cuda: break;
  }
  MM_CHECK(false, "this build has no kernels for the device");
}

static bool use_bf16(const Device& dev) { return dev.matmul == DType::bf16; }

static double moved(std::initializer_list<View> views) {  // bytes of what an op reads and writes once
  double s = 0;
  for (const View& v : views) s += v ? static_cast<double>(v.bytes()) : 0.0;
  return s;
}

static void check_2d(const View& v, int64_t rows, int64_t cols, const char* what) {
  MM_CHECK(v.dtype == DType::f32 && v.rows() == rows && v.cols() == cols, "{}: {} {}, wanted f32 [{}, {}]", what,
           dtype_name(v.dtype), v.shape.str(), rows, cols);
}

static void check_dense(const View& v, int64_t rows, int64_t cols, const char* what) {
  check_2d(v, rows, cols, what);
  MM_CHECK(v.contiguous(), "{} must be contiguous", what);
}

static float* opt(const View& v) { return v ? v.f32() : nullptr; }

void linear_fwd(const Device& dev, View y, View x, View w, bool accumulate) {
  const int64_t m = x.rows(), k = x.cols(), n = w.rows();
  check_2d(y, m, n, "y");
  check_dense(w, n, k, "w");
  const Zone zone(dev.profiler, "linear_fwd", moved({y, x, w}), 2.0 * static_cast<double>(m * n * k));
  kernels(dev).linear_fwd(y.f32(), y.ld, x.f32(), x.ld, w.f32(), m, n, k, accumulate, use_bf16(dev));
}

void linear_bwd(const Device& dev, View dx, View dw, View dy, View x, View w, bool accumulate_dx) {
  const int64_t m = dy.rows(), n = dy.cols(), k = w.cols();
  check_2d(x, m, k, "x");
  check_dense(w, n, k, "w");
  if (dx) check_2d(dx, m, k, "dx");
  if (dw) check_dense(dw, n, k, "dw");
  const double products = (dx ? 1 : 0) + (dw ? 1 : 0);
  const Zone zone(dev.profiler, "linear_bwd", moved({dx, dw, dy, x, w}),
                  products * 2.0 * static_cast<double>(m * n * k));
  kernels(dev).linear_bwd(opt(dx), dx.ld, opt(dw), dy.f32(), dy.ld, x.f32(), x.ld, w.f32(), m, n, k, accumulate_dx,
                          use_bf16(dev));
}

void embed_fwd(const Device& dev, View out, View table, const int32_t* ids) {
  check_dense(out, out.rows(), table.cols(), "out");
  const Zone zone(dev.profiler, "embed_fwd", 2 * moved({out}), 0);
  kernels(dev).embed_fwd(out.f32(), table.f32(), ids, out.rows(), out.cols());
}

void embed_bwd(const Device& dev, View dtable, View dout, const int32_t* ids) {
  check_dense(dout, dout.rows(), dtable.cols(), "dout");
  const Zone zone(dev.profiler, "embed_bwd", 3 * moved({dout}), static_cast<double>(dout.numel()));
  kernels(dev).embed_bwd(dtable.f32(), dout.f32(), ids, dout.rows(), dout.cols());
}

void rmsnorm_fwd(const Device& dev, View y, View rstd, View x, View w, float eps) {
  const int64_t n = x.rows(), d = x.cols();
  check_dense(x, n, d, "x");
  check_dense(y, n, d, "y");
  MM_CHECK(w.numel() == d && (!rstd || rstd.numel() == n));
  const Zone zone(dev.profiler, "rmsnorm_fwd", moved({y, x, w}), 4.0 * static_cast<double>(n * d));
  kernels(dev).rmsnorm_fwd(y.f32(), opt(rstd), x.f32(), w.f32(), eps, n, d);
}

void rmsnorm_bwd(const Device& dev, View dx, View dw, View dy, View x, View rstd, View w) {
  const int64_t n = x.rows(), d = x.cols();
  check_dense(dx, n, d, "dx");
  check_dense(dy, n, d, "dy");
  check_dense(x, n, d, "x");
  MM_CHECK(w.numel() == d && dw.numel() == d && rstd.numel() == n);
  const Zone zone(dev.profiler, "rmsnorm_bwd", moved({dx, dx, dy, x}), 10.0 * static_cast<double>(n * d));
  kernels(dev).rmsnorm_bwd(dx.f32(), dw.f32(), dy.f32(), x.f32(), rstd.f32(), w.f32(), n, d);
}

static void check_norm_rope(const View& qkv, const NormRopeArgs& a) {
  check_dense(qkv, a.n, static_cast<int64_t>(a.n_head + 2 * a.n_kv_head) * a.d_head, "qkv");
  MM_CHECK(a.d_head % 2 == 0 && a.d_head <= 1024);
}

void qk_norm_rope_fwd(const Device& dev, View q, View k, View v, const int64_t* slots, View qkv,
                      const NormRopeArgs& a) {
  check_norm_rope(qkv, a);
  check_dense(q, a.n, static_cast<int64_t>(a.n_head) * a.d_head, "q");
  MM_CHECK(k.cols() == static_cast<int64_t>(a.n_kv_head) * a.d_head && (!v || v.cols() == k.cols()));
  const Zone zone(dev.profiler, "qk_norm_rope_fwd", 2 * moved({qkv}), 8.0 * static_cast<double>(qkv.numel()));
  kernels(dev).qk_norm_rope_fwd(q.f32(), k.f32(), k.ld, opt(v), v.ld, slots, qkv.f32(), a);
}

void qk_norm_rope_bwd(const Device& dev, View dqkv, View dq_weight, View dk_weight, View qkv, const NormRopeArgs& a) {
  check_norm_rope(qkv, a);
  check_norm_rope(dqkv, a);
  MM_CHECK((a.q_weight == nullptr) == !dq_weight && (a.k_weight == nullptr) == !dk_weight);
  const Zone zone(dev.profiler, "qk_norm_rope_bwd", 3 * moved({qkv}), 16.0 * static_cast<double>(qkv.numel()));
  kernels(dev).qk_norm_rope_bwd(dqkv.f32(), opt(dq_weight), opt(dk_weight), qkv.f32(), a);
}

// Visible (query, key) pairs of one head, and keys read.
static void attention_work(const AttentionArgs& a, double* pairs, double* keys) {
  *pairs = *keys = 0;
  for (int64_t s = 0; s < a.n_seq; s++) {
    const double q = a.cu[s + 1] - a.cu[s], kv = a.kv_len != nullptr ? a.kv_len[s] : q;
    *pairs += q * (kv - q) + q * (q + 1) / 2;
    *keys += kv;
  }
}

static void check_attention(const AttentionArgs& a) {
  MM_CHECK(a.n_kv_head > 0 && a.n_head % a.n_kv_head == 0 && a.dropout >= 0 && a.dropout < 1);
  for (int64_t s = 0; s < a.n_seq; s++)
    MM_CHECK(a.cu[s] <= a.cu[s + 1] && (a.kv_len == nullptr || a.kv_len[s] >= a.cu[s + 1] - a.cu[s]));
}

void attention_fwd(const Device& dev, const AttentionArgs& a) {
  check_attention(a);
  double pairs = 0, keys = 0;
  attention_work(a, &pairs, &keys);
  const double n = a.cu[a.n_seq] - a.cu[0], dh = a.d_head;
  const Zone zone(dev.profiler, "attention_fwd", 4 * dh * (2 * n * a.n_head + 2 * keys * a.n_kv_head),
                  4 * pairs * a.n_head * dh);
  kernels(dev).attention_fwd(a);
}

void attention_bwd(const Device& dev, const AttentionBwdArgs& b) {
  const AttentionArgs& a = b.fwd;
  check_attention(a);
  MM_CHECK(a.kv_start == nullptr && a.kv_len == nullptr && a.lse != nullptr);
  double pairs = 0, keys = 0;
  attention_work(a, &pairs, &keys);
  const double n = a.cu[a.n_seq] - a.cu[0], dh = a.d_head;
  const Zone zone(dev.profiler, "attention_bwd", 4 * dh * n * (4 * a.n_head + 4 * a.n_kv_head),
                  10 * pairs * a.n_head * dh);
  kernels(dev).attention_bwd(b);
}

void swiglu_fwd(const Device& dev, View act, View gate_up) {
  check_dense(gate_up, act.rows(), 2 * act.cols(), "gate_up");
  check_dense(act, act.rows(), act.cols(), "act");
  const Zone zone(dev.profiler, "swiglu_fwd", moved({act, gate_up}), 20.0 * static_cast<double>(act.numel()));
  kernels(dev).swiglu_fwd(act.f32(), gate_up.f32(), act.rows(), act.cols());
}

void swiglu_bwd(const Device& dev, View dgate_up, View dact, View gate_up) {
  check_dense(dact, dact.rows(), dact.cols(), "dact");
  check_dense(gate_up, dact.rows(), 2 * dact.cols(), "gate_up");
  check_dense(dgate_up, dact.rows(), 2 * dact.cols(), "dgate_up");
  MM_CHECK(dgate_up.data != dact.data);
  const Zone zone(dev.profiler, "swiglu_bwd", moved({dgate_up, dact, gate_up}),
                  26.0 * static_cast<double>(dact.numel()));
  kernels(dev).swiglu_bwd(dgate_up.f32(), dact.f32(), gate_up.f32(), dact.rows(), dact.cols());
}

void logprob_fwd(const Device& dev, View logp, View lse, View logits, const int32_t* targets) {
  check_dense(logits, logp.numel(), logits.cols(), "logits");
  MM_CHECK(lse.numel() == logp.numel());
  const Zone zone(dev.profiler, "logprob_fwd", moved({logits}), 15.0 * static_cast<double>(logits.numel()));
  kernels(dev).logprob_fwd(logp.f32(), lse.f32(), logits.f32(), targets, logits.rows(), logits.cols());
}

void logprob_bwd(const Device& dev, View logits, View lse, View g, const int32_t* targets) {
  check_dense(logits, lse.numel(), logits.cols(), "logits");
  MM_CHECK(g.numel() == lse.numel());
  const Zone zone(dev.profiler, "logprob_bwd", 2 * moved({logits}), 15.0 * static_cast<double>(logits.numel()));
  kernels(dev).logprob_bwd(logits.f32(), lse.f32(), g.f32(), targets, logits.rows(), logits.cols());
}

void dropout(const Device& dev, View x, float p, uint64_t seed, uint64_t stream) {
  MM_CHECK(x.contiguous() && p > 0 && p < 1);
  const Zone zone(dev.profiler, "dropout", 2 * moved({x}), static_cast<double>(x.numel()));
  kernels(dev).dropout(x.f32(), p, seed, stream, x.numel());
}

void add(const Device& dev, View y, View x) {
  MM_CHECK(x.contiguous() && y.contiguous() && x.numel() == y.numel());
  const Zone zone(dev.profiler, "add", moved({y, y, x}), static_cast<double>(x.numel()));
  kernels(dev).add(y.f32(), x.f32(), x.numel());
}

void gather_rows(const Device& dev, View out, View x, const int32_t* rows) {
  check_dense(out, out.rows(), x.cols(), "out");
  const Zone zone(dev.profiler, "gather_rows", 2 * moved({out}), 0);
  kernels(dev).gather_rows(out.f32(), x.f32(), rows, out.rows(), out.cols());
}

void scatter_rows(const Device& dev, View out, View x, const int32_t* rows) {
  check_dense(x, x.rows(), out.cols(), "x");
  const Zone zone(dev.profiler, "scatter_rows", 2 * moved({x}), 0);
  kernels(dev).scatter_rows(out.f32(), x.f32(), rows, x.rows(), x.cols());
}

void moe_route_fwd(const Device& dev, View scores, int32_t* experts, View weights, View logits, bool norm_topk) {
  const int64_t n = logits.rows();
  check_dense(logits, n, logits.cols(), "logits");
  check_dense(scores, n, logits.cols(), "scores");
  check_dense(weights, n, weights.cols(), "weights");
  const Zone zone(dev.profiler, "moe_route_fwd", moved({scores, weights, weights, logits}),
                  20.0 * static_cast<double>(logits.numel()));
  kernels(dev).moe_route_fwd(scores.f32(), experts, weights.f32(), logits.f32(), n, static_cast<int>(logits.cols()),
                             static_cast<int>(weights.cols()), norm_topk);
}

void moe_route_bwd(const Device& dev, View dlogits, View dweights, View daux, View scores, const int32_t* experts,
                   bool norm_topk) {
  const int64_t n = scores.rows();
  check_dense(dlogits, n, scores.cols(), "dlogits");
  MM_CHECK(daux.numel() == scores.cols() && dweights.rows() == n);
  const Zone zone(dev.profiler, "moe_route_bwd", moved({dlogits, scores, dweights, dweights}),
                  8.0 * static_cast<double>(scores.numel()));
  kernels(dev).moe_route_bwd(dlogits.f32(), dweights.f32(), daux.f32(), scores.f32(), experts, n,
                             static_cast<int>(scores.cols()), static_cast<int>(dweights.cols()), norm_topk);
}

void moe_combine_fwd(const Device& dev, View out, View y, const int32_t* slot, View weights) {
  check_dense(y, out.rows() * weights.cols(), out.cols(), "y");
  const Zone zone(dev.profiler, "moe_combine_fwd", moved({out, out, y}), 2.0 * static_cast<double>(y.numel()));
  kernels(dev).moe_combine_fwd(out.f32(), y.f32(), slot, weights.f32(), out.rows(), static_cast<int>(weights.cols()),
                               out.cols());
}

void moe_combine_bwd(const Device& dev, View dy, View dweights, View dout, View y, const int32_t* slot, View weights) {
  check_dense(y, dout.rows() * weights.cols(), dout.cols(), "y");
  check_dense(dy, y.rows(), y.cols(), "dy");
  const Zone zone(dev.profiler, "moe_combine_bwd", moved({dy, dout, y}), 3.0 * static_cast<double>(y.numel()));
  kernels(dev).moe_combine_bwd(dy.f32(), dweights.f32(), dout.f32(), y.f32(), slot, weights.f32(), dout.rows(),
                               static_cast<int>(weights.cols()), dout.cols());
}

void scatter_add(const Device& dev, View out, View x, const int32_t* slot, int top_k) {
  check_dense(x, out.rows() * top_k, out.cols(), "x");
  const Zone zone(dev.profiler, "scatter_add", moved({out, x}), static_cast<double>(x.numel()));
  kernels(dev).scatter_add(out.f32(), x.f32(), slot, out.rows(), top_k, out.cols());
}

void adamw(const Device& dev, View p, View g, View m, View v, const AdamWArgs& args) {
  MM_CHECK(p.numel() == g.numel() && p.numel() == m.numel() && p.numel() == v.numel() && args.step >= 1);
  const Zone zone(dev.profiler, "adamw", 7.0 * static_cast<double>(p.bytes()), 12.0 * static_cast<double>(p.numel()));
  kernels(dev).adamw(p.f32(), g.f32(), m.f32(), v.f32(), args, p.numel());
}

void copy(const Device& dev, View y, View x) {
  MM_CHECK(x.contiguous() && y.contiguous() && x.numel() == y.numel());
  const Zone zone(dev.profiler, "copy", moved({x, y}), 0);
  kernels(dev).copy(y.f32(), x.f32(), x.numel());
}

void zero(const Device& dev, View x) {
  MM_CHECK(x.contiguous());
  const Zone zone(dev.profiler, "zero", moved({x}), 0);
  kernels(dev).zero(x.f32(), x.numel());
}

double sum_sq(const Device& dev, View x) {
  MM_CHECK(x.contiguous());
  const Zone zone(dev.profiler, "sum_sq", moved({x}), 2.0 * static_cast<double>(x.numel()));
  return kernels(dev).sum_sq(x.f32(), x.numel());
}

}  // namespace mm::ops
