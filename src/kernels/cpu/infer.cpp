// The model's step on the CPU. Stages of a layer and who splits them; every "|" is a spin barrier:
//
//   norm, qkv product | rotation, write of k and v, attention | o product + x | norm, gate and up product, SwiGLU |
//   down product + x |
//
// Products are split by rows of the weights, the same rows for the same thread in every step, so that a thread's part
// stays in its caches as far as it fits. With one token each thread prepares the operand (norm, quantization) for
// itself, which costs less than a barrier, or, of int8 weights, each its columns (infer_norm.cpp); with more tokens the
// rows are split and a barrier follows. Floor of a decode step: the bytes of the packed weights and of the keys and
// values over the bandwidth of the level that holds them.
#include "kernels/cpu/infer.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/error.h"
#include "base/thread_team.h"
#include "kernels/cpu/infer_worker.h"

namespace mm::cpu {

Worker::Worker(StepShared& shared, int thread, int n_thread)
    : s_(shared), m_(shared.model), step_(shared.step), k_(shared.k), p_(shared.plan), t_(thread), n_(n_thread) {
  b_.lay_out(p_.thread_memory + p_.thread_bytes * t_, p_, m_);
}

void Worker::embed() {
  for (int64_t t = begin_of(p_.n_tok); t < end_of(p_.n_tok); t++) {
    const int64_t at = step_.ids[t] * m_.d_model;
    float* to = p_.x + t * m_.d_model;
    if (m_.embed.format == WeightFormat::bf16)
      k_.bf16_row(to, static_cast<const uint16_t*>(m_.embed.data) + at, m_.d_model);
    else std::memcpy(to, static_cast<const float*>(m_.embed.data) + at, static_cast<size_t>(m_.d_model) * 4);
  }
  barrier();
}

void Worker::attention_half(const InferLayer& layer, int64_t l) {
  const int64_t d = m_.d_model;
  const auto norm = [&](int64_t r, float* to) { k_.norm_row(to, p_.x + r * d, layer.input_norm, m_.eps, d); };
  const Operand h = s_.shares && l > 0 ? take() : prepare(layer.qkv, p_.n_tok, s_.alone, norm);
  product(h, 0, p_.n_tok, layer.qkv, p_.qkv, layer.qkv.n, false, &layer.o);
  barrier();
  if (s_.decode) {
    attend_decode(layer, l);
  } else {
    rope_and_store(layer, l);
    barrier();
    attend_tasks(l);
  }
  barrier();
  const Operand a = prepare(layer.o, p_.n_tok, s_.alone, [&](int64_t r, float* to) { combine_token(r, to); });
  product(a, 0, p_.n_tok, layer.o, p_.x, d, true, m_.n_expert > 0 ? nullptr : &layer.gate_up);
  if (s_.shares) offer(layer.post_norm);
  barrier();
}

void Worker::ffn_half(const InferLayer& layer, const InferMatrix* next, const float* next_norm) {
  if (m_.n_expert > 0) {
    moe_half(layer, next);
    return;
  }
  const int64_t d = m_.d_model;
  const auto norm = [&](int64_t r, float* to) { k_.norm_row(to, p_.x + r * d, layer.post_norm, m_.eps, d); };
  const Operand h = s_.shares ? take() : prepare(layer.gate_up, p_.n_tok, s_.alone, norm);
  const FfnGroup all{&layer.gate_up, &layer.down, 0, p_.n_tok, 0};
  Operand act{kind_for(layer.down, p_.n_tok), 0, 0, p_.act};
  ffn_inner(h, &all, 1, &act);
  product(act, 0, p_.n_tok, layer.down, p_.x, d, true, next);
  if (s_.shares) offer(next_norm);
  barrier();
}

void Worker::head() {
  const int64_t d = m_.d_model, n = p_.n_out;
  if (n == 0) return;
  const bool alone = n == 1;
  const auto norm = [&](int64_t r, float* to) {
    k_.norm_row(to, p_.x + step_.out_rows[r] * d, m_.final_norm, m_.eps, d);
    if (step_.hidden != nullptr && (!alone || t_ == 0))
      std::memcpy(step_.hidden + r * d, to, static_cast<size_t>(d) * 4);
  };
  const Operand h = s_.shares && step_.hidden == nullptr ? take() : prepare(m_.head, n, alone, norm);
  if (step_.logits == nullptr) return;
  product(h, 0, n, m_.head, step_.logits, m_.n_vocab, false, &m_.layers[0].qkv);
  if (step_.best == nullptr) return;
  const int64_t panels = panels_of(m_.n_vocab), pairs = (panels + 1) / 2;  // as product() splits them
  const bool by_panel = use_few(h, n);
  const auto column = [&](int64_t panel, int64_t pair) {
    return std::min(m_.n_vocab, (by_panel ? panel : 2 * pair) * infer_panel);
  };
  find_best(column(begin_of(panels), begin_of(pairs)), column(end_of(panels), end_of(pairs)));
}

void Worker::find_best(int64_t begin, int64_t end) {
  for (int64_t r = 0; r < p_.n_out; r++) {
    PartBest& part = p_.best[t_ * p_.n_out + r];
    part = {-INFINITY, 0};
    if (begin == end) continue;
    const float* row = step_.logits + r * m_.n_vocab;
    part.id = static_cast<int32_t>(begin + k_.first_largest(row + begin, end - begin, &part.value));
  }
}

// The best of all threads' parts, which lie in the order of the columns.
static int32_t best_of(const StepPlan& plan, int64_t row, int n_thread) {
  PartBest best{-INFINITY, -1};
  for (int t = 0; t < n_thread; t++) {
    const PartBest& part = plan.best[t * plan.n_out + row];
    if (std::isnan(part.value)) return -1;
    if (part.value > best.value) best = part;
  }
  return best.id;
}

void Worker::run() {
  k_.begin_thread();
  embed();
  for (int64_t l = 0; l < m_.n_layer; l++) {
    const InferLayer* const next = l + 1 < m_.n_layer ? &m_.layers[l + 1] : nullptr;
    attention_half(m_.layers[l], l);
    ffn_half(m_.layers[l], next != nullptr ? &next->qkv : &m_.head, next != nullptr ? next->input_norm : m_.final_norm);
  }
  head();
  k_.end_thread();
}

// Whether every product behind a norm is a dense int8 one.
static bool norms_feed_int8(const InferModel& m) {
  const auto is_int8 = [](const InferMatrix& w) { return w.format == WeightFormat::i8; };
  return m.n_expert == 0 && is_int8(m.head) && std::all_of(m.layers, m.layers + m.n_layer, [&](const InferLayer& l) {
           return is_int8(l.qkv) && is_int8(l.gate_up);
         });
}

void infer_step(const InferModel& model, const InferKv& kv, const InferStep& step, void* scratch,
                bool batch_invariant) {
  infer_step_with(infer_kernels(), model, kv, step, scratch, batch_invariant);
}

void infer_step_with(const InferKernels& kernels, const InferModel& model, const InferKv& kv, const InferStep& step,
                     void* scratch, bool batch_invariant) {
  if (step.n_tok == 0) return;
  // Kept from step to step: its flags stay in the caches of the threads that use them.
  static thread_local SpinBarrier barrier;
  barrier.begin(num_threads());
  StepShared shared{
      .model = model, .kv = kv, .step = step, .k = kernels, .barrier = barrier, .invariant = batch_invariant};
  shared.plan.lay_out(static_cast<char*>(scratch), model, step.n_tok, step.n_out, num_threads());
  shared.decode = !batch_invariant && step.n_tok == step.n_seq;
  for (int64_t s = 0; s < step.n_seq; s++) shared.decode = shared.decode && step.cu[s + 1] - step.cu[s] == 1;
  shared.alone = step.n_tok == 1;
  shared.shares =
      shared.alone && num_threads() > 1 && !batch_invariant && shared.plan.share_columns > 0 && norms_feed_int8(model);
  shared.next_task[0] = shared.next_task[1] = 0;
  if (shared.decode) split_keys(shared, num_threads());
  parallel_team([&](int thread, int n_thread) {
    MM_CHECK(n_thread == num_threads(), "a step inside a parallel region");
    Worker(shared, thread, n_thread).run();
  });
  for (int64_t r = 0; step.best != nullptr && r < step.n_out; r++)
    step.best[r] = best_of(shared.plan, r, num_threads());
}

}  // namespace mm::cpu
