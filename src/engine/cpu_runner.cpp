#include "engine/cpu_runner.h"

#include <algorithm>
#include <cstring>

#include "base/error.h"
#include "base/thread_team.h"
#include "engine/kv_views.h"
#include "engine/sampler.h"
#include "kernels/cpu/infer.h"

namespace mm {

CpuRunner::CpuRunner(const Model& model, const EngineOptions& options, const RunnerLimits& limits)
    : options_(options),
      limits_(limits),
      weights_(model, options.weights, limits.context),
      n_kv_row_(staggered_rows(model.config, options.kv, limits.n_row)),
      kv_buffer_(static_cast<size_t>(n_kv_row_) * kv_bytes_per_token(model.config, options.kv)),
      scratch_(cpu::infer_scratch_bytes(weights_.model(), limits.max_tok, limits.max_out)),
      logits_(static_cast<size_t>(limits.max_out * model.config.vocab_size) * sizeof(float)),
      hidden_(static_cast<size_t>(limits.max_out * model.config.hidden_size) * sizeof(float)),
      kv_(kv_views(model.config, options.kv, n_kv_row_, kv_buffer_)),
      samplers_(static_cast<size_t>(num_threads())) {}

static void copy_rows(const InferModel& m, const InferKv& kv, const RowCopy& c) {
  const size_t row = static_cast<size_t>(m.d_head) * kv_element_bytes(kv.format);
  const auto n = static_cast<size_t>(c.count), from = static_cast<size_t>(c.from), to = static_cast<size_t>(c.to);
  const auto n_row = static_cast<size_t>(kv.layer_stride) / static_cast<size_t>(m.n_kv_head * m.d_head);
  for (size_t head = 0; head < static_cast<size_t>(m.n_layer * m.n_kv_head); head++) {
    for (void* rows : {kv.k, kv.v}) {
      char* p = static_cast<char*>(rows) + head * n_row * row;
      std::memmove(p + to * row, p + from * row, n * row);
    }
    if (kv.format != KvFormat::i8) continue;
    for (float* scales : {kv.k_scale, kv.v_scale})
      std::memmove(scales + head * n_row + to, scales + head * n_row + from, n * sizeof(float));
  }
}

void CpuRunner::submit(const StepBatch& b) {
  const InferModel& m = weights_.model();
  MM_CHECK(b.n_tok() > 0 && b.n_tok() <= limits_.max_tok && b.n_out() <= limits_.max_out);
  for (const RowCopy& c : b.copies) copy_rows(m, kv_, c);
  size_t width = 1;
  for (const auto& t : b.tables) width = std::max(width, t.size());
  table_.assign(b.tables.size() * width, 0);
  for (size_t s = 0; s < b.tables.size(); s++)
    std::copy(b.tables[s].begin(), b.tables[s].end(), table_.begin() + static_cast<std::ptrdiff_t>(s * width));
  const auto n_out = static_cast<size_t>(b.n_out()), vocab = static_cast<size_t>(m.n_vocab);
  result_.ids.assign(b.hidden ? 0 : n_out, -1);
  const bool any_largest = !b.hidden && std::any_of(b.sampling.begin(), b.sampling.end(), draws_largest);
  const InferStep step{.n_tok = b.n_tok(),
                       .n_seq = b.n_seq(),
                       .n_out = b.n_out(),
                       .ids = b.ids.data(),
                       .positions = b.positions.data(),
                       .slots = b.slots.data(),
                       .cu = b.cu.data(),
                       .kv_len = b.kv_len.data(),
                       .table = table_.data(),
                       .table_ld = static_cast<int64_t>(width),
                       .block_shift = b.block_shift,
                       .out_rows = b.out_rows.data(),
                       .logits = b.hidden ? nullptr : logits_.f32(),
                       .hidden = b.hidden ? hidden_.f32() : nullptr,
                       .best = any_largest ? result_.ids.data() : nullptr};
  cpu::infer_step(m, kv_, step, scratch_.data(), options_.batch_invariant);

  result_.logits.clear();
  result_.hidden.clear();
  if (b.hidden) {
    result_.hidden.assign(hidden_.f32(), hidden_.f32() + n_out * static_cast<size_t>(m.d_model));
    return;
  }
  const auto words = (vocab + 31) / 32;
  const auto draw = [&](int64_t row, int thread) {
    const auto i = static_cast<size_t>(row);
    const RowSampling& r = b.sampling[i];
    if (draws_largest(r)) return;
    const std::span<const LogitEdit> edits(b.edits.data() + r.edits_begin, b.edits.data() + r.edits_end);
    std::span<const uint32_t> mask;
    if (r.mask >= 0) mask = {b.masks.data() + static_cast<size_t>(r.mask) * words, words};
    result_.ids[i] =
        samplers_[static_cast<size_t>(thread)].sample_row({logits_.f32() + i * vocab, vocab}, r, edits, mask);
  };
  if (n_out == 1) draw(0, 0);
  else if (!std::all_of(b.sampling.begin(), b.sampling.end(), draws_largest)) parallel_dynamic(b.n_out(), draw);
  for (const int32_t i : b.logits_of) {
    const float* row = logits_.f32() + static_cast<size_t>(i) * vocab;
    result_.logits.insert(result_.logits.end(), row, row + vocab);
  }
}

// A prompt that fills a step: the first one finds all memory missing (with 26M, INT8: 15 to 70 ms instead of 2.5). Its
// keys lie in rows that no sequence has yet.
void CpuRunner::warm_up() {
  const int64_t n = std::min({limits_.max_tok, limits_.context, limits_.n_row});
  StepBatch b;
  for (int32_t i = 0; i < n; i++) {
    b.ids.push_back(0);
    b.positions.push_back(i);
    b.slots.push_back(i);
  }
  b.cu.push_back(static_cast<int32_t>(n));
  b.kv_len = {static_cast<int32_t>(n)};
  b.tables = {{0}};
  b.block_shift = 30;  // one block of all rows
  b.out_rows = {static_cast<int32_t>(n - 1)};
  b.sampling.emplace_back();
  submit(b);
}

void CpuRunner::collect(StepResult& result) { std::swap(result, result_); }

std::string CpuRunner::description() const {
  return fmt::format("cpu, {} threads, {} weights, {} keys and values", num_threads(),
                     weight_format_name(options_.weights), kv_format_name(options_.kv));
}

}  // namespace mm
