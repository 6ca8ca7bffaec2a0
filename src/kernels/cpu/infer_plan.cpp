// Sizes of packed weights and of the step's scratch.
#include "kernels/cpu/infer_plan.h"

#include "base/cpu_features.h"
#include "base/error.h"
#include "base/thread_team.h"
#include "kernels/cpu/infer.h"
#include "kernels/cpu/isa/infer_isa.h"

namespace mm::cpu {

int64_t panel_bytes(WeightFormat format, int64_t k) {
  switch (format) {
    case WeightFormat::f32: return k * infer_panel * 4;
    case WeightFormat::bf16: return padded_k(k) * infer_panel * 2;
    case WeightFormat::i8: return padded_k(k) / 64 * infer_i8_block;
    case WeightFormat::f16: break;
  }
  MM_CHECK(false, "no packed layout for this weight format");
  return 0;
}

namespace {

InferKernels kernels_of(Isa isa) {
  InferKernels k = scalar::infer_kernels;
#ifdef MM_X86
  if (isa == Isa::avx2) k = avx2::infer_kernels, use_avx2(&k);
  if (isa >= Isa::avx512) k = avx512::infer_kernels, use_avx512(&k);
  if (isa >= Isa::avx512_bf16) use_avx512_bf16(&k);
  if (isa >= Isa::amx) use_amx(&k);
#endif
  return k;
}

}  // namespace

std::vector<std::pair<Isa, InferKernels>> all_infer_kernels() {
  std::vector<std::pair<Isa, InferKernels>> v;
  for (const Isa isa : available_isas()) v.emplace_back(isa, kernels_of(isa));
  return v;
}

const InferKernels& infer_kernels() {
  static const InferKernels chosen = kernels_of(selected_isa());
  return chosen;
}

int64_t Operand::bytes(OperandKind kind, int64_t rows, int64_t k) {
  const int64_t kp = padded_k(k);
  switch (kind) {
    case OperandKind::f32: return rows * k * 4;
    case OperandKind::bf16: return round_up(rows, 16) * kp * 2;
    case OperandKind::q8: return rows * (kp + kp / 32 * 8);
  }
  return 0;
}

namespace {

int64_t operand_bytes(int64_t rows, int64_t k) {
  return std::max({Operand::bytes(OperandKind::f32, rows, k), Operand::bytes(OperandKind::bf16, rows, k),
                   Operand::bytes(OperandKind::q8, rows, k)});
}

// Hands out pieces of the scratch, each on a cache line of its own.
struct Cursor {
  char* base = nullptr;
  size_t used = 0;
  template <class T>
  void take(T** to, int64_t n) {
    *to = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used += (static_cast<size_t>(n) * sizeof(T) + 63) / 64 * 64;
  }
};

}  // namespace

size_t StepPlan::lay_out(char* scratch, const InferModel& m, int64_t tokens, int64_t outs, int threads) {
  n_tok = tokens, n_out = outs, n_thread = threads;
  const bool moe = m.n_expert > 0;
  const int64_t dh = m.d_head, q_width = m.n_head * dh, width = q_width + 2 * m.n_kv_head * dh;
  const int64_t group = m.n_head / m.n_kv_head, n_group = moe ? m.n_expert + m.n_shared : 1;
  n_slot = moe ? n_tok * (m.n_expert_per_tok + m.n_shared) + infer_panel * n_group : n_tok;
  ffn = m.d_ff;
  max_k = std::max({m.d_model, q_width, ffn});

  Cursor at{scratch};
  at.take(&x, n_tok * m.d_model);
  at.take(&qkv, n_tok * width);
  at.take(&attn, n_tok * q_width);
  at.take(&operand,
          std::max({operand_bytes(n_slot, m.d_model), operand_bytes(n_tok, q_width), operand_bytes(n_out, m.d_model)}));
  at.take(&act, operand_bytes(n_slot, ffn));
  at.take(&gate_up, ffn % 32 != 0 ? n_slot * 2 * ffn : 0);
  share_columns = m.d_model % (32 * n_thread) == 0 && m.d_model % infer_k_pad == 0 ? m.d_model / n_thread : 0;
  share_bytes = round_up(share_columns + share_columns / 32 * 12, 64);
  at.take(&shares, share_bytes * n_thread);
  partial_floats = group * (dh + 2);
  at.take(&partial, 2 * n_thread * partial_floats);
  at.take(&bounds, n_thread + 1);
  at.take(&best, n_thread * n_out);
  at.take(&groups, n_group);
  at.take(&h, moe ? n_tok * m.d_model : 0);
  at.take(&expert_out, moe ? n_slot * m.d_model : 0);
  at.take(&experts, moe ? n_tok * m.n_expert_per_tok : 0);
  at.take(&expert_weights, moe ? n_tok * m.n_expert_per_tok : 0);
  at.take(&slot_token, moe ? n_slot : 0);
  at.take(&token_slot, moe ? n_tok * m.n_expert_per_tok : 0);

  ThreadBuffers one;
  thread_bytes = static_cast<int64_t>(one.lay_out(nullptr, *this, m));
  thread_bytes = round_up(thread_bytes, 4096) + 256;  // threads' buffers not at equal places of a page
  at.take(&thread_memory, thread_bytes * n_thread);
  return at.used;
}

size_t ThreadBuffers::lay_out(char* memory, const StepPlan& plan, const InferModel& m) {
  const int64_t group = m.n_head / m.n_kv_head, dh = m.d_head;
  const int64_t rows = round_up(std::max(attend_rows, group), 16), kp = padded_k(plan.max_k), dp = round_up(dh, 32);
  Cursor at{memory};
  at.take(&row, kp);
  at.take(&c, staging_floats);
  at.take(&c2, staging_floats);
  at.take(&tiles, 4 * infer_panel * kp);
  at.take(&operand, operand_bytes(1, plan.max_k));
  at.take(&groups, m.n_expert_per_tok + m.n_shared);
  at.take(&experts, m.n_expert_per_tok);
  at.take(&expert_weights, m.n_expert_per_tok);
  at.take(&parts, plan.n_thread);
  at.take(&q, group * dh);
  at.take(&attend, (4 * infer_key_block * dp + rows * (3 * dp + 2 * infer_key_block + 4)) * 4 + 4096);
  return at.used;
}

size_t infer_scratch_bytes(const InferModel& model, int64_t max_tok, int64_t max_out) {
  StepPlan plan;
  return plan.lay_out(nullptr, model, max_tok, max_out, num_threads());
}

}  // namespace mm::cpu
