// Experts of the inference step: routing of every token, rows sorted by expert (each expert's rows start at a tile),
// the same two products as a dense feed-forward by groups of rows, and the weighted sum. Shared experts are groups of
// all tokens with weight 1.
#include <cmath>
#include <cstring>

#include "kernels/cpu/infer_worker.h"

namespace mm::cpu {

// Softmax of the router's logits of the normed row h, the k best (ties: the lower index), their weights.
void Worker::route(const InferLayer& layer, const float* h, int32_t* chosen, float* weights) const {
  float* p = b_.c;
  for (int e = 0; e < m_.n_expert; e += infer_panel) {
    k_.few_f32(p + e, infer_panel, static_cast<const float*>(layer.router.data) + e * m_.d_model, m_.d_model, 1, h,
               m_.d_model, 1, {nullptr, reinterpret_cast<const char*>(h)});
  }
  float top = p[0], sum = 0, chosen_sum = 0;
  for (int e = 1; e < m_.n_expert; e++) top = p[e] > top ? p[e] : top;
  for (int e = 0; e < m_.n_expert; e++) sum += p[e] = std::exp(p[e] - top);
  for (int e = 0; e < m_.n_expert; e++) p[e] /= sum;
  for (int j = 0; j < m_.n_expert_per_tok; j++) {
    int best = -1;
    for (int e = 0; e < m_.n_expert; e++) {
      if (std::find(chosen, chosen + j, e) == chosen + j && (best < 0 || p[e] > p[best])) best = e;
    }
    chosen[j] = best;
    weights[j] = p[best];
    chosen_sum += p[best];
  }
  for (int j = 0; m_.norm_topk && j < m_.n_expert_per_tok; j++) weights[j] /= chosen_sum + 1e-20f;
}

// Fills groups, slot_token (-1: a gap before the next tile) and token_slot.
void Worker::order_experts(const InferLayer& layer) {
  const int64_t picks = p_.n_tok * m_.n_expert_per_tok;
  int64_t slot = 0;
  for (int e = 0; e < m_.n_expert; e++) {
    FfnGroup& g = p_.groups[e];
    g = {&layer.expert_gate_up[e], &layer.expert_down[e], slot, 0, slot};
    for (int64_t i = 0; i < picks; i++) {
      if (p_.experts[i] != e) continue;
      p_.slot_token[slot + g.rows] = static_cast<int32_t>(i / m_.n_expert_per_tok);
      p_.token_slot[i] = static_cast<int32_t>(slot + g.rows++);
    }
    while (slot < round_up(g.row0 + g.rows, infer_panel)) {
      if (slot >= g.row0 + g.rows) p_.slot_token[slot] = -1;
      slot++;
    }
  }
  for (int e = 0; e < m_.n_shared; e++) {
    p_.groups[m_.n_expert + e] = {&layer.shared_gate_up[e], &layer.shared_down[e], slot, p_.n_tok, slot};
    for (int64_t t = 0; t < round_up(p_.n_tok, infer_panel); t++)
      p_.slot_token[slot++] = static_cast<int32_t>(t < p_.n_tok ? t : -1);
  }
}

// One token: every thread routes for itself, and the sum over experts happens where their rows are made, so that the
// layer has no more barriers than a dense one.
void Worker::moe_alone(const InferLayer& layer, const InferMatrix* next) {
  const int64_t d = m_.d_model, top_k = m_.n_expert_per_tok, n_group = top_k + m_.n_shared;
  const Operand h = prepare(layer.expert_gate_up[0], 1, true,
                            [&](int64_t, float* to) { k_.norm_row(to, p_.x, layer.post_norm, m_.eps, d); });
  route(layer, b_.row, b_.experts, b_.expert_weights);
  for (int64_t g = 0; g < n_group; g++) {
    const bool shared = g >= top_k;
    const int64_t e = shared ? g - top_k : b_.experts[g];
    b_.groups[g] = {shared ? &layer.shared_gate_up[e] : &layer.expert_gate_up[e],
                    shared ? &layer.shared_down[e] : &layer.expert_down[e], g * infer_panel, 1, 0};
  }
  Operand act{kind_for(layer.expert_down[0], 1), 0, 0, p_.act};
  ffn_inner(h, b_.groups, n_group, &act);
  for (int64_t g = 0; g < n_group; g++) {
    float* y = p_.expert_out;  // only this thread's columns, by this thread
    product(act, b_.groups[g].row0, 1, *b_.groups[g].down, y, d, false, g + 1 < n_group ? b_.groups[g + 1].down : next);
    const int64_t panels = panels_of(d);
    const int64_t begin = begin_of(panels) * infer_panel, end = std::min(d, end_of(panels) * infer_panel);
    k_.axpy(p_.x + begin, g < top_k ? b_.expert_weights[g] : 1.0f, y + begin, end - begin);
  }
  barrier();
}

void Worker::moe_half(const InferLayer& layer, const InferMatrix* next) {
  if (s_.alone && !s_.invariant) {
    moe_alone(layer, next);
    return;
  }
  const int64_t d = m_.d_model, n_group = m_.n_expert + m_.n_shared, top_k = m_.n_expert_per_tok;
  for (int64_t t = begin_of(p_.n_tok); t < end_of(p_.n_tok); t++) {
    k_.norm_row(p_.h + t * d, p_.x + t * d, layer.post_norm, m_.eps, d);
    route(layer, p_.h + t * d, p_.experts + t * top_k, p_.expert_weights + t * top_k);
  }
  barrier();
  if (t_ == 0) order_experts(layer);
  barrier();
  const FfnGroup& last = p_.groups[n_group - 1];
  const int64_t n_slot = round_up(last.row0 + last.rows, infer_panel);
  int64_t most = 0;
  for (int64_t g = 0; g < n_group; g++) most = std::max(most, p_.groups[g].rows);
  const OperandKind kind = kind_for(layer.expert_gate_up[0], most);
  const Operand h{kind, d, padded_k(d), p_.operand};
  for (int64_t s = begin_of(n_slot); s < end_of(n_slot); s++) {
    if (p_.slot_token[s] >= 0) put_row(h, s, p_.h + p_.slot_token[s] * d);
  }
  barrier();
  Operand act{kind_for(layer.expert_down[0], most), 0, 0, p_.act};
  ffn_inner(h, p_.groups, n_group, &act);
  for (int64_t g = 0; g < n_group; g++)
    product(act, p_.groups[g].row0, p_.groups[g].rows, *p_.groups[g].down, p_.expert_out + p_.groups[g].row0 * d, d,
            false, nullptr);
  barrier();
  for (int64_t t = begin_of(p_.n_tok); t < end_of(p_.n_tok); t++) {
    float* x = p_.x + t * d;
    for (int64_t j = 0; j < top_k; j++)
      k_.axpy(x, p_.expert_weights[t * top_k + j], p_.expert_out + p_.token_slot[t * top_k + j] * d, d);
    for (int e = 0; e < m_.n_shared; e++) k_.add(x, p_.expert_out + (p_.groups[m_.n_expert + e].row0 + t) * d, d);
  }
  barrier();
}

}  // namespace mm::cpu
