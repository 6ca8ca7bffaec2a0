// One thread of the CPU inference step, and what the threads share. The parts of the step lie in infer*.cpp.
#pragma once

#include <atomic>
#include <cstdint>

#include "base/spin_barrier.h"
#include "kernels/cpu/infer_plan.h"

namespace mm::cpu {

struct StepShared {
  const InferModel& model;
  const InferKv& kv;
  const InferStep& step;
  const InferKernels& k;
  SpinBarrier& barrier;
  StepPlan plan;
  bool invariant = false;
  bool short_past = false;                     // so few keys a thread that fp32 attention beats tiles
  bool decode = false;                         // every sequence has one token, so keys may be split over threads
  bool shares = false;                         // one token whose norms are split by columns: offer() and take()
  bool alone = false;                          // so few tokens that every thread prepares the operands for itself
  std::atomic<int64_t> next_task[2] = {0, 0};  // attention's, of even and odd layers
};

// Stages are collective: all workers call them in the same order, and a stage that others read ends with a barrier.
class Worker {
 public:
  Worker(StepShared& shared, int thread, int n_thread);
  void run();

 private:
  // infer.cpp
  void embed();
  void attention_half(const InferLayer& layer, int64_t l);
  // next: the product to follow, behind next_norm.
  void ffn_half(const InferLayer& layer, const InferMatrix* next, const float* next_norm);
  void head();
  void find_best(int64_t begin, int64_t end);  // of the logits' columns [begin, end)

  // infer_product.cpp
  OperandKind kind_for(const InferMatrix& w, int64_t rows) const;
  bool use_few(const Operand& x, int64_t rows) const;
  void put_cols(const Operand& to, int64_t r, int64_t begin, int64_t n, const float* x) const;
  void finish_row(const Operand& to, int64_t r) const;  // zeros behind k
  void put_row(const Operand& to, int64_t r, const float* x) const;
  void few(float* c, const Operand& x, int64_t row0, int64_t rows, const InferMatrix& w, int64_t panel, int64_t panels,
           const WeightStream& stream) const;
  // Sets soon_ to what lies behind the part of a stream that the kernels have asked for.
  void follow(const WeightStream& stream);
  // This thread's panels end before `end_panel`; `next` is the matrix of the product to follow (null: none).
  WeightStream stream_to(const InferMatrix& w, int64_t end_panel, const InferMatrix* next) const;
  void many(float* c, const Operand& x, int64_t row0, int64_t rows, int64_t panels, const uint16_t* tiles,
            const uint16_t* next) const;
  const uint16_t* behind(const InferMatrix& w, const uint16_t* tiles) const;
  const uint16_t* expanded(const InferMatrix& w, int64_t panel, int64_t panels, int64_t slot) const;
  // This thread's columns of x w^T; row row0 + r goes to out + r * ldo. No barrier.
  void product(const Operand& x, int64_t row0, int64_t rows, const InferMatrix& w, float* out, int64_t ldo, bool add,
               const InferMatrix* next);
  void product_swiglu(const Operand& x, const FfnGroup& g, const Operand& act);
  // act = silu(gate) * up of all groups. Ends with a barrier.
  void ffn_inner(const Operand& x, const FfnGroup* groups, int64_t n_group, Operand* act);
  // The operand of a product with w; make(r, to) writes row r as fp32. Ends with a barrier unless `alone`.
  template <class F>
  Operand prepare(const InferMatrix& w, int64_t rows, bool alone, F&& make) {
    const Operand to{kind_for(w, rows), w.k, padded_k(w.k), alone ? b_.operand : p_.operand};
    for (int64_t r = alone ? 0 : begin_of(rows); r < (alone ? rows : end_of(rows)); r++) {
      make(r, b_.row);
      put_row(to, r, b_.row);
    }
    if (!alone) barrier();
    return to;
  }

  // infer_norm.cpp
  void offer(const float* norm);
  Operand take() const;

  // infer_attention.cpp
  int64_t rows_of(const InferKv& kv) const { return kv.layer_stride / (m_.n_kv_head * m_.d_head); }
  AttendArgs attend_args(int64_t seq, int kv_head, int64_t l) const;
  void rope_q(const InferLayer& layer, int64_t token, int head, float* to) const;
  void store_kv(const InferLayer& layer, int64_t token, int kv_head, int64_t l);
  void rope_and_store(const InferLayer& layer, int64_t l);
  void attend(const AttendArgs& a, bool f32) const;
  void attend_tasks(int64_t l);
  void attend_decode(const InferLayer& layer, int64_t l);
  int parts_of(int64_t item) const;
  void combine_token(int64_t token, float* to) const;  // attention of one token, all heads

  // infer_moe.cpp
  void route(const InferLayer& layer, const float* h, int32_t* chosen, float* weights) const;
  void order_experts(const InferLayer& layer);
  void moe_alone(const InferLayer& layer, const InferMatrix* next);
  void moe_half(const InferLayer& layer, const InferMatrix* next);

  void barrier() {
    s_.barrier.wait(t_, n_, [this] { ask(16); });
  }
  // Asks for up to n cache lines of what this thread reads next, from soon_ to soon_end_.
  void ask(int n) {
    for (; n > 0 && soon_ < soon_end_; n--, soon_ += 64) __builtin_prefetch(soon_, 0, 3);
  }
  // This thread's part of n units of work.
  int64_t begin_of(int64_t n) const { return n * t_ / n_; }
  int64_t end_of(int64_t n) const { return n * (t_ + 1) / n_; }

  StepShared& s_;
  const InferModel& m_;
  const InferStep& step_;
  const InferKernels& k_;
  const StepPlan& p_;
  int t_, n_;
  ThreadBuffers b_;
  const char *soon_ = nullptr, *soon_end_ = nullptr;
};

// The split of a decode step's keys over the threads, into plan.bounds.
void split_keys(StepShared& shared, int n_thread);

}  // namespace mm::cpu
