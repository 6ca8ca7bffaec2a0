// The ops of a mixture of experts.
#include "kernels/moe_order.h"
#include "kernels/ops_detail.h"

namespace mm::ops {

void moe_route_fwd(const Device& dev, View scores, int32_t* experts, View weights, View logits, bool norm_topk) {
  const int64_t n = logits.rows();
  check_dense(logits, n, logits.cols(), "logits");
  check_dense(scores, n, logits.cols(), "scores");
  check_dense(weights, n, weights.cols(), "weights");
  const Zone zone(dev.profiler, "moe_route_fwd", moved({scores, weights, weights, logits}),
                  20.0 * static_cast<double>(logits.numel()));
  ON_CUDA(moe_route_fwd(gpu(dev), logits.dtype, scores.f32(), experts, weights.f32(), logits.data, n,
                        static_cast<int>(logits.cols()), static_cast<int>(weights.cols()), norm_topk))
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
  ON_CUDA(moe_route_bwd(gpu(dev), dlogits.dtype, dlogits.data, dweights.f32(), daux.f32(), scores.f32(), experts, n,
                        static_cast<int>(scores.cols()), static_cast<int>(dweights.cols()), norm_topk))
  kernels(dev).moe_route_bwd(dlogits.f32(), dweights.f32(), daux.f32(), scores.f32(), experts, n,
                             static_cast<int>(scores.cols()), static_cast<int>(dweights.cols()), norm_topk);
}

void moe_combine_fwd(const Device& dev, View out, View y, const int32_t* slot, View weights) {
  check_dense(y, out.rows() * weights.cols(), out.cols(), "y");
  const Zone zone(dev.profiler, "moe_combine_fwd", moved({out, out, y}), 2.0 * static_cast<double>(y.numel()));
  ON_CUDA(moe_combine_fwd(gpu(dev), out.dtype, out.data, y.data, slot, weights.f32(), out.rows(),
                          static_cast<int>(weights.cols()), out.cols()))
  kernels(dev).moe_combine_fwd(out.f32(), y.f32(), slot, weights.f32(), out.rows(), static_cast<int>(weights.cols()),
                               out.cols());
}

void moe_combine_bwd(const Device& dev, View dy, View dweights, View dout, View y, const int32_t* slot, View weights) {
  check_dense(y, dout.rows() * weights.cols(), dout.cols(), "y");
  check_dense(dy, y.rows(), y.cols(), "dy");
  const Zone zone(dev.profiler, "moe_combine_bwd", moved({dy, dout, y}), 3.0 * static_cast<double>(y.numel()));
  ON_CUDA(moe_combine_bwd(gpu(dev), dy.dtype, dy.data, dweights.f32(), dout.data, y.data, slot, weights.f32(),
                          dout.rows(), static_cast<int>(weights.cols()), dout.cols()))
  kernels(dev).moe_combine_bwd(dy.f32(), dweights.f32(), dout.f32(), y.f32(), slot, weights.f32(), dout.rows(),
                               static_cast<int>(weights.cols()), dout.cols());
}

void scatter_add(const Device& dev, View out, View x, const int32_t* slot, int top_k) {
  check_dense(x, out.rows() * top_k, out.cols(), "x");
  const Zone zone(dev.profiler, "scatter_add", moved({out, x}), static_cast<double>(x.numel()));
  ON_CUDA(scatter_add(gpu(dev), out.dtype, out.data, x.data, slot, out.rows(), top_k, out.cols()))
  kernels(dev).scatter_add(out.f32(), x.f32(), slot, out.rows(), top_k, out.cols());
}

void moe_sort(const Device& dev, View slot, View rows, View offset, View experts) {
  const int64_t pairs = experts.numel(), top_k = experts.cols(), n_expert = offset.numel() - 1;
  MM_CHECK(slot.numel() == pairs && rows.numel() == pairs);
  const Zone zone(dev.profiler, "moe_sort", moved({slot, rows, experts}), 0);
  auto *s = slot.as<int32_t>(), *r = rows.as<int32_t>(), *o = offset.as<int32_t>();
  const auto* expert = experts.as<int32_t>();
  ON_CUDA(moe_sort(gpu(dev), s, r, o, expert, experts.rows(), static_cast<int>(top_k), static_cast<int>(n_expert)))
  moe_sort_host(s, r, o, expert, pairs, top_k, n_expert);
}

void moe_balance(const Device& dev, View aux, View daux, const float* share, View scores, View offset, double coef) {
  const int64_t n = scores.rows(), n_expert = scores.cols();
  MM_CHECK(offset.numel() == n_expert + 1 && (!daux || daux.numel() == n_expert));
  const Zone zone(dev.profiler, "moe_balance", moved({scores}), static_cast<double>(scores.numel()));
  double* sum = aux ? aux.as<double>() : nullptr;
  ON_CUDA(moe_balance(gpu(dev), sum, opt(daux), share, scores.f32(), offset.as<int32_t>(), n,
                      static_cast<int>(n_expert), coef))
  moe_balance_host(sum, opt(daux), *share, scores.f32(), offset.as<int32_t>(), n, n_expert, coef);
}

void grouped_fwd(const Device& dev, View y, View x, View w, int64_t stride, View offset) {
  const int64_t n = w.rows(), k = w.cols(), n_expert = offset.numel() - 1;
  check_dense(x, x.rows(), k, "x");
  check_dense(y, x.rows(), n, "y");
  const Zone zone(dev.profiler, "grouped_fwd", moved({y, x}) + static_cast<double>(n_expert) * moved({w}),
                  2.0 * static_cast<double>(x.rows() * n * k));
  const auto* o = offset.as<int32_t>();
  ON_CUDA(grouped_fwd(gpu(dev), x.dtype, y.data, x.data, w.data, stride, o, x.rows(), n, k, static_cast<int>(n_expert)))
  for (int64_t e = 0; e < n_expert; e++) {
    if (o[e] == o[e + 1]) continue;
    kernels(dev).linear_fwd(y.f32() + o[e] * n, n, x.f32() + o[e] * k, k, w.f32() + e * stride, o[e + 1] - o[e], n, k,
                            false, use_bf16(dev));
  }
}

void grouped_bwd(const Device& dev, View dx, View dw, View dy, View x, View w, int64_t stride, View offset) {
  const int64_t n = w.rows(), k = w.cols(), n_expert = offset.numel() - 1;
  check_dense(dy, dy.rows(), n, "dy");
  if (dx) check_dense(dx, dy.rows(), k, "dx");
  if (dw) check_dense(x, dy.rows(), k, "x");
  const double products = (dx ? 1 : 0) + (dw ? 1 : 0);
  const Zone zone(dev.profiler, "grouped_bwd", moved({dx, dy, x}) + static_cast<double>(n_expert) * moved({dw, w}),
                  products * 2.0 * static_cast<double>(dy.rows() * n * k));
  const auto* o = offset.as<int32_t>();
#ifdef MM_CUDA
  if (dev.kind == DeviceKind::cuda) {
    const int e = static_cast<int>(n_expert);
    if (dx) cuda::grouped_dgrad(gpu(dev), dy.dtype, dx.data, dy.data, w.data, stride, o, dy.rows(), n, k, e);
    if (dw) cuda::grouped_wgrad(gpu(dev), dy.dtype, dw.f32(), stride, dy.data, x.data, o, dy.rows(), n, k, e);
    return;
  }
#endif
  for (int64_t e = 0; e < n_expert; e++) {
    if (o[e] == o[e + 1]) continue;
    kernels(dev).linear_bwd(dx ? dx.f32() + o[e] * k : nullptr, k, dw ? dw.f32() + e * stride : nullptr,
                            dy.f32() + o[e] * n, n, dw ? x.f32() + o[e] * k : nullptr, k, w.f32() + e * stride,
                            o[e + 1] - o[e], n, k, false, use_bf16(dev));
  }
}

}  // namespace mm::ops
