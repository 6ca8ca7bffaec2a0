// Steps on a GPU: inputs go over in one block, a decode step replays a captured graph or runs as one persistent kernel,
// the draw stays on the device, and the next step can be queued before the host knows what this one drew.
#pragma once

#include <deque>

#include "engine/runner.h"
#include "kernels/graph_cache.h"
#include "model/gpu_weights.h"
#include "model/paged_forward.h"

namespace mm {

class CudaRunner final : public Runner {
 public:
  CudaRunner(const Model& model, const EngineOptions& options, const RunnerLimits& limits);
  ~CudaRunner() override;
  int depth() const override { return 2; }
  void submit(const StepBatch& batch) override;
  void collect(StepResult& result) override;
  void warm_up() override;
  std::string description() const override;
  void update(const Model& model) override;

 private:
  // Where the lists of a step lie in a block; the same for every step of one shape, so that a graph finds them.
  struct Layout {
    int64_t n_tok, n_out, n_seq, table_ld;
    size_t ids, positions, slots, seq, n_key, out_rows, sampling, gather_start, table, prompt_table, copies, end;
  };
  Layout layout(int64_t n_tok, int64_t n_out, int64_t n_seq, int64_t table_ld, int64_t n_copies) const;
  struct Slot {  // of a ring: what one step needs on the host
    Buffer block, tables, ids, edits, masks, floats;
    Fence fence;
    std::vector<int32_t> logits_of;
    int64_t n_out = 0;
    bool hidden = false;
    DType dtype = DType::f32;  // of floats
  };
  struct Shape {                                          // what kind of step it is
    int64_t n_decode = 0, n_prompt = 0, gather_rows = 0;  // rows that decode, sequences that do not
    bool gather = false, plain = false;                   // plain: one token a sequence, all of them wanted
  };
  Shape shape_of(const StepBatch& batch) const;
  void fill(Slot& slot, const Layout& l, const StepBatch& batch, const Shape& shape);
  void put_copies(Slot& slot, const Layout& l, const StepBatch& batch);
  void copy_rows(const StepBatch& batch, const Layout& l);
  void upload_lists(Slot& slot, const StepBatch& batch);
  PagedBatch device_batch(const Layout& l, const StepBatch& batch, const Shape& shape) const;
  void run_prompts(const StepBatch& batch, const Layout& l, Shape shape);
  bool takes_persistent(const StepBatch& batch, const Shape& shape) const;
  void run_persistent(Slot& slot, const StepBatch& batch);
  void run_graph(const StepBatch& batch, const Layout& l, const Shape& shape);
  void finish(Slot& slot, const StepBatch& batch, bool has_ids);
  template <class T>
  T* at(size_t offset) const {
    return reinterpret_cast<T*>(static_cast<char*>(gpu_block_.data()) + offset);
  }
  int64_t bucket(int64_t n) const;
  void make_persistent();
  size_t persistent_ld() const;  // entries of a table

  EngineOptions options_;
  RunnerLimits limits_;
  Device dev_;
  GpuWeights weights_;
  Buffer kv_buffer_;
  InferKv kv_;
  Activations acts_;
  PagedScratch scratch_;
  BatchStage prompt_stage_;
  TokenBatch prompt_batch_;
  KvCache::Plan prompt_plan_;
  Buffer gpu_block_, gpu_ids_, gpu_edits_, gpu_masks_, gpu_logits_, gpu_tables_;
  std::vector<std::vector<int32_t>> sent_tables_;  // what gpu_tables_ holds, by row
  ops::PersistentStep persistent_;
  int64_t persistent_most_ = 0;  // rows that it computes
  View logits_;                  // of the step last queued
  GraphCache graphs_;
  std::vector<Slot> slots_;
  size_t turn_ = 0;
  std::deque<size_t> flying_;
};

}  // namespace mm
