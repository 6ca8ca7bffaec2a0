#include "kernels/ops_infer.h"

#include "kernels/ops_detail.h"
#ifdef MM_CUDA
#include "kernels/cuda/infer_kernels.h"
#endif

namespace mm::ops {

#ifdef MM_CUDA

static size_t kv_size(KvFormat f) { return f == KvFormat::f32 ? 4 : f == KvFormat::i8 ? 1 : 2; }

static cuda::KvLayer layer_of(const InferKv& kv, int64_t layer, int d_head) {
  const auto at = static_cast<size_t>(layer * kv.layer_stride);
  cuda::KvLayer l{.format = kv.format,
                  .k = static_cast<char*>(kv.k) + at * kv_size(kv.format),
                  .v = static_cast<char*>(kv.v) + at * kv_size(kv.format)};
  if (kv.format == KvFormat::i8) {
    l.k_scale = kv.k_scale + at / static_cast<size_t>(d_head);
    l.v_scale = kv.v_scale + at / static_cast<size_t>(d_head);
  }
  return l;
}

static cuda::NormRope rope_of(const NormRope& a) {
  return {.q_weight = a.q_weight.data,
          .k_weight = a.k_weight.data,
          .cos = a.cos,
          .sin = a.sin,
          .positions = a.positions,
          .eps = a.eps,
          .n = a.n,
          .n_head = a.n_head,
          .n_kv_head = a.n_kv_head,
          .d_head = a.d_head};
}

void paged_norm_rope(const Device& dev, View q, const InferKv& kv, int64_t layer, View k, View v, const int32_t* slots,
                     View qkv, const NormRope& a) {
  check_dense(q, a.n, a.n_head * a.d_head, "q");
  check_dense(qkv, a.n, (a.n_head + 2 * a.n_kv_head) * a.d_head, "qkv");
  const Zone zone(dev.profiler, "paged_norm_rope", 2 * moved({qkv}), 10.0 * static_cast<double>(qkv.numel()));
  cuda::paged_norm_rope(gpu(dev), qkv.dtype, q.data, layer_of(kv, layer, a.d_head), k.data, v.data, slots, qkv.data,
                        rope_of(a));
}

void kv_gather(const Device& dev, View k, View v, const InferKv& kv, int64_t layer, const int32_t* start,
               const PageTable& table, int64_t n_seq, int d_head) {
  check_dense(v, k.rows(), k.cols(), "v");
  const Zone zone(dev.profiler, "kv_gather", 2 * moved({k, v}), 0);
  cuda::kv_gather(gpu(dev), k.dtype, k.data, v.data, layer_of(kv, layer, d_head), start, table.rows, table.ld,
                  table.block_shift, n_seq, k.rows(), static_cast<int>(k.cols()) / d_head, d_head);
}

void kv_copy_rows(const Device& dev, const InferKv& kv, int64_t n_layer, const int32_t* from, const int32_t* to,
                  const int32_t* count, int64_t n, int64_t max_count, int n_kv_head, int d_head) {
  const Zone zone(dev.profiler, "kv_copy_rows", 0, 0);
  cuda::kv_copy_rows(gpu(dev), kv, n_layer, from, to, count, n, max_count, n_kv_head, d_head);
}

static cuda::PagedAttention attention_of(View out, const PagedAttention& a) {
  return {.out = out.data,
          .ldo = out.ld,
          .seq = a.seq,
          .n_key = a.n_key,
          .table = a.table.rows,
          .table_ld = a.table.ld,
          .block_shift = a.table.block_shift,
          .n_row = out.rows(),
          .max_key = a.max_key,
          .n_new = a.n_new,
          .invariant = a.invariant,
          .n_head = a.n_head,
          .n_kv_head = a.n_kv_head,
          .d_head = a.d_head,
          .scale = a.scale};
}

void attention_paged(const Device& dev, View out, View q, const InferKv& kv, int64_t layer, const PagedAttention& a) {
  check_2d(q, out.rows(), a.n_head * a.d_head, "q");
  const Zone zone(dev.profiler, "attention_paged", moved({q, out}), 0);  // how many keys only the device knows
  cuda::PagedAttention p = attention_of(out, a);
  p.q = q.data, p.ldq = q.ld;
  cuda::attention_paged(gpu(dev), q.dtype, layer_of(kv, layer, a.d_head), p);
}

bool attention_paged_rope(const Device& dev, View out, const InferKv& kv, int64_t layer, const PagedAttention& a,
                          View qkv, const NormRope& rope) {
  check_dense(qkv, out.rows(), (a.n_head + 2 * a.n_kv_head) * a.d_head, "qkv");
  cuda::PagedAttention p = attention_of(out, a);
  p.qkv = qkv.data, p.rope = rope_of(rope);
  const cuda::KvLayer l = layer_of(kv, layer, a.d_head);
  if (a.n_new != 1 || !cuda::attention_paged_ropes(gpu(dev), out.dtype, l, p)) return false;
  const Zone zone(dev.profiler, "attention_paged", moved({qkv, out}), 0);
  cuda::attention_paged(gpu(dev), out.dtype, l, p);
  return true;
}

void quantize_i8(const Device& dev, const InferMatrix& to, View w) {
  check_dense(w, to.n, to.k, "w");
  cuda::quantize_i8(gpu(dev), static_cast<int8_t*>(const_cast<void*>(to.data)), const_cast<void*>(to.scales), w.f32(),
                    to.n, to.k);
}

void linear_i8(const Device& dev, View y, View x, const InferMatrix& w, View residual) {
  check_dense(y, x.rows(), w.n, "y");
  check_dense(x, x.rows(), w.k, "x");
  const double n = static_cast<double>(w.n), k = static_cast<double>(w.k);
  const Zone zone(dev.profiler, "linear_i8", moved({x, y}) + n * k, 2 * static_cast<double>(x.rows()) * n * k);
  cuda::linear_i8(gpu(dev), x.dtype, y.data, x.data, static_cast<const int8_t*>(w.data), w.scales, residual.data,
                  x.rows(), w.n, w.k);
}

static bool holds_type(WeightFormat f, DType t) {
  switch (f) {
    case WeightFormat::i8: return true;
    case WeightFormat::bf16: return t == DType::bf16;
    case WeightFormat::f16: return t == DType::f16;
    case WeightFormat::f32: return false;
  }
  return false;
}

// Measured on an H100, decode steps of 64M and 26M: from 5 rows on 5 to 10 % faster than linear_few (26M at 8 to 16
// rows 3 to 6 % slower), from 24 on 30 %.
static bool is_wide(const Device& dev, DType t, const cuda::FewLinear& a) {
  return a.m >= 5 && cuda::linear_wide_fits(gpu(dev), t, a);
}

static void linear_wide(const Device& dev, View y, View x, const cuda::FewLinear& a) {
  check_dense(y, a.m, a.swiglu ? a.n / 2 : a.n, "y");
  check_dense(x, a.m, a.k, "x");
  const double n = static_cast<double>(a.n), k = static_cast<double>(a.k);
  const Zone zone(dev.profiler, "linear_wide", moved({x, y}) + 2 * n * k, 2 * static_cast<double>(a.m) * n * k);
  cuda::linear_wide(gpu(dev), x.dtype, a);
}

bool linear_few(const Device& dev, View y, View x, View norm, float eps, const InferMatrix& w, View residual,
                bool swiglu) {
  const cuda::FewLinear a = {.y = y.data,
                             .x = x.data,
                             .w = w.data,
                             .scales = w.format == WeightFormat::i8 ? w.scales : nullptr,
                             .norm = norm.data,
                             .residual = residual.data,
                             .eps = eps,
                             .swiglu = swiglu,
                             .m = x.rows(),
                             .n = w.n,
                             .k = w.k};
  if (!holds_type(w.format, x.dtype)) return false;
  if (is_wide(dev, x.dtype, a)) {
    linear_wide(dev, y, x, a);
    return true;
  }
  if (!cuda::linear_few_fits(x.dtype, a) || !cuda::linear_few_pays(a)) return false;
  check_dense(y, a.m, swiglu ? a.n / 2 : a.n, "y");
  check_dense(x, a.m, a.k, "x");
  const double n = static_cast<double>(a.n), k = static_cast<double>(a.k);
  const double bytes = w.format == WeightFormat::i8 ? 1.0 + 2.0 / static_cast<double>(weight_group) : 2.0;
  const Zone zone(dev.profiler, "linear_few", moved({x, y, residual}) + bytes * n * k,
                  2 * static_cast<double>(a.m) * n * k);
  cuda::linear_few(gpu(dev), x.dtype, a);
  return true;
}

static cuda::ScaledRows scaled_of(const ScaledRows& a) {
  return {.norm = a.norm.data, .scaled = a.scaled.data, .squares = static_cast<float*>(a.squares.data)};
}

static cuda::FewLinear product_of(const InferMatrix& w, int64_t m, bool swiglu = false) {
  return {.w = w.data,
          .scales = w.format == WeightFormat::i8 ? w.scales : nullptr,
          .swiglu = swiglu,
          .m = m,
          .n = w.n,
          .k = w.k};
}

bool linear_scaled_takes(const Device& dev, DType t, const InferModel& model, int64_t n_tok) {
  if (model.n_expert > 0 || n_tok > most_scaled) return false;
  const InferLayer& l = model.layers[0];
  const auto takes = [&](const InferMatrix& w, bool swiglu = false) {
    return holds_type(w.format, t) && is_wide(dev, t, product_of(w, n_tok, swiglu));
  };
  return takes(l.qkv) && takes(l.o) && takes(l.gate_up, true) && takes(l.down);
}

void embed_scaled(const Device& dev, View x, const ScaledRows& next, View table, const int32_t* ids) {
  check_dense(x, x.rows(), table.cols(), "x");
  const Zone zone(dev.profiler, "embed_scaled", 3 * moved({x}), 0);
  cuda::embed_scaled(gpu(dev), x.data, scaled_of(next), table.data, ids, x.rows(), x.cols());
}

void linear_scaled_add(const Device& dev, View x, View y, const InferMatrix& w, const ScaledRows& next) {
  cuda::FewLinear a = product_of(w, x.rows());
  a.y = x.data, a.x = y.data, a.residual = x.data, a.next = scaled_of(next);
  linear_wide(dev, x, y, a);
}

bool linear_scaled(const Device& dev, View y, const ScaledRows& x, float eps, const InferMatrix& w, bool swiglu) {
  cuda::FewLinear a = product_of(w, x.scaled.rows(), swiglu);
  a.y = y.data, a.x = x.scaled.data, a.eps = eps, a.squares = static_cast<const float*>(x.squares.data);
  if (!holds_type(w.format, y.dtype) || !is_wide(dev, y.dtype, a)) return false;
  linear_wide(dev, y, x.scaled, a);
  return true;
}

void sample_rows(const Device& dev, int32_t* ids, View logits, const RowSampling* params, const LogitEdit* edits,
                 const uint32_t* masks) {
  const Zone zone(dev.profiler, "sample_rows", moved({logits}), 0);
  cuda::sample_rows(gpu(dev), logits.dtype, ids, nullptr, logits.data, logits.ld, logits.cols(), params, edits, masks,
                    logits.rows());
}

void resolve_ids(const Device& dev, int32_t* ids, const int32_t* source, int64_t n) {
  cuda::resolve_ids(gpu(dev), ids, source, n);
}

PersistentStep::PersistentStep(const Device& dev, const InferModel& model, const InferKv& kv, int64_t max_rows,
                               int64_t max_keys) {
  auto* p = cuda::persistent_decode_create(gpu(dev), model, kv, {.max_rows = max_rows, .max_keys = max_keys}, &why_);
  if (p == nullptr) return;
  plan_ = std::shared_ptr<void>(
      p, [](void* plan) { cuda::persistent_decode_destroy(static_cast<cuda::PersistentDecode*>(plan)); });
}

void PersistentStep::run(const Device& dev, const PersistentStepBatch& step) const {
  const Zone zone(dev.profiler, "persistent_step", 0, 0);
  cuda::persistent_decode_run(gpu(dev), static_cast<cuda::PersistentDecode*>(plan_.get()), step);
}

#else  // no device of this kind can be opened

static void no_gpu() { MM_CHECK(false, "a build without CUDA"); }
void paged_norm_rope(const Device&, View, const InferKv&, int64_t, View, View, const int32_t*, View, const NormRope&) {
  no_gpu();
}
void kv_gather(const Device&, View, View, const InferKv&, int64_t, const int32_t*, const PageTable&, int64_t, int) {
  no_gpu();
}
void kv_copy_rows(const Device&, const InferKv&, int64_t, const int32_t*, const int32_t*, const int32_t*, int64_t,
                  int64_t, int, int) {
  no_gpu();
}
void attention_paged(const Device&, View, View, const InferKv&, int64_t, const PagedAttention&) { no_gpu(); }
bool attention_paged_rope(const Device&, View, const InferKv&, int64_t, const PagedAttention&, View, const NormRope&) {
  no_gpu();
  return false;
}
void quantize_i8(const Device&, const InferMatrix&, View) { no_gpu(); }
void linear_i8(const Device&, View, View, const InferMatrix&, View) { no_gpu(); }
bool linear_few(const Device&, View, View, View, float, const InferMatrix&, View, bool) {
  no_gpu();
  return false;
}
bool linear_scaled_takes(const Device&, DType, const InferModel&, int64_t) {
  no_gpu();
  return false;
}
void embed_scaled(const Device&, View, const ScaledRows&, View, const int32_t*) { no_gpu(); }
void linear_scaled_add(const Device&, View, View, const InferMatrix&, const ScaledRows&) { no_gpu(); }
bool linear_scaled(const Device&, View, const ScaledRows&, float, const InferMatrix&, bool) {
  no_gpu();
  return false;
}
void sample_rows(const Device&, int32_t*, View, const RowSampling*, const LogitEdit*, const uint32_t*) { no_gpu(); }
void resolve_ids(const Device&, int32_t*, const int32_t*, int64_t) { no_gpu(); }
PersistentStep::PersistentStep(const Device&, const InferModel&, const InferKv&, int64_t, int64_t) { no_gpu(); }
void PersistentStep::run(const Device&, const PersistentStepBatch&) const { no_gpu(); }

#endif

}  // namespace mm::ops
