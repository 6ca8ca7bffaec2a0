#include "engine/cuda_runner.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

#include "base/error.h"
#include "base/log.h"
#include "base/progress.h"
#include "engine/kv_views.h"

namespace mm {

namespace {

constexpr size_t n_slots = 4;
constexpr int64_t short_rows = 8;       // so many tokens of a sequence attend row by row, as in decoding
constexpr int64_t persistent_rows = 8;  // sequences that the persistent kernel takes at most

template <class T>
void put(const Buffer& block, size_t at, const std::vector<T>& from) {
  std::memcpy(static_cast<char*>(block.data()) + at, from.data(), from.size() * sizeof(T));
}
template <class T>
T* in(const Buffer& block, size_t at) {
  return reinterpret_cast<T*>(static_cast<char*>(block.data()) + at);
}

}  // namespace

// Few sizes of steps, so that few graphs and few choices of products serve all. Batch-invariant: one, so that the same
// kernels compute a row whatever else is in the step; and every token attends row by row.
int64_t CudaRunner::bucket(int64_t n) const {
  if (options_.batch_invariant) return limits_.max_tok;
  return std::min(step_bucket(n), limits_.max_tok);
}

CudaRunner::CudaRunner(const Model& model, const EngineOptions& options, const RunnerLimits& limits)
    : options_(options),
      limits_(limits),
      dev_(options.device),
      weights_(model, options.weights, limits.context, dev_),
      kv_buffer_(static_cast<size_t>(limits.n_row) * kv_bytes_per_token(model.config, options.kv), Memory::cuda),
      kv_(kv_views(model.config, options.kv, limits.n_row, kv_buffer_)),
      acts_(model.config, limits.max_tok, /*train=*/false, dev_),
      scratch_(model.config, limits.max_out, std::max(limits.max_tok, limits.prompt_keys), dev_),
      prompt_stage_(dev_, limits.max_tok, model.config.num_key_value_heads) {
  const int64_t table_ld = std::max<int64_t>(
      16, std::bit_ceil(static_cast<uint64_t>(limits.context / std::max<int64_t>(1, options.block_size) + 1)));
  // Tables are the largest list: all sequences of full length do not fit the pool, so this bounds what a step can name.
  const int64_t n_seq = bucket(std::max(limits.max_seq, limits.max_out));
  const size_t bytes = layout(limits.max_tok, limits.max_out, n_seq, table_ld, 4 * n_seq).end;
  const ModelConfig& c = model.config;
  const auto out = static_cast<size_t>(limits.max_out);
  gpu_block_ = Buffer(bytes, Memory::cuda);
  gpu_ids_ = Buffer(out * sizeof(int32_t), Memory::cuda);
  gpu_edits_ = Buffer(out * static_cast<size_t>(c.vocab_size) * sizeof(LogitEdit), Memory::cuda);
  gpu_masks_ = Buffer(out * static_cast<size_t>((c.vocab_size + 31) / 32) * sizeof(uint32_t), Memory::cuda);
  for (size_t i = 0; i < n_slots; i++) {
    slots_.emplace_back();
    slots_.back().block = Buffer(bytes, Memory::pinned);
    slots_.back().ids = Buffer(out * sizeof(int32_t), Memory::pinned);
  }
  make_persistent();
}

bool CudaRunner::takes_persistent(const StepBatch& b, const Shape& shape) const {
  return shape.plain && persistent_ && b.n_tok() <= persistent_most_;
}

void CudaRunner::make_persistent() {
  const ModelConfig& c = weights_.replica().config;
  if (c.is_moe() || options_.batch_invariant || dev_.act != DType::bf16) return;
  gpu_logits_ = Buffer(static_cast<size_t>(persistent_rows * c.vocab_size) * sizeof(float), Memory::cuda);
  persistent_ =
      ops::PersistentStep(dev_, weights_.model(), kv_, std::min(persistent_rows, limits_.max_seq), limits_.context);
  // With more rows a graph with wide products is faster, where the GPU has those.
  persistent_most_ = ops::linear_scaled_takes(dev_, dev_.act, weights_.model(), persistent_rows) ? 4 : persistent_rows;
  sent_tables_.assign(static_cast<size_t>(persistent_rows), {});
  const size_t table_bytes = static_cast<size_t>(persistent_rows) * persistent_ld() * sizeof(int32_t);
  gpu_tables_ = Buffer(table_bytes, Memory::cuda);
  for (Slot& s : slots_) s.tables = Buffer(table_bytes, Memory::pinned);
  if (!persistent_) log_info("decode steps run as graphs of ordinary kernels: {}", persistent_.why());
}

void CudaRunner::update(const Model& model) {
  weights_.update(model);
  persistent_ = {};  // holds weights of its own
  make_persistent();
}

CudaRunner::~CudaRunner() {
  try {
    synchronize(dev_.stream);
  } catch (const Error& e) {  // a broken GPU has been reported already
    log_debug("{}", e.what());
  }
}

std::string CudaRunner::description() const {
  return fmt::format("{}, {} weights, {} keys and values{}", cuda_status().name, weight_format_name(options_.weights),
                     kv_format_name(options_.kv), persistent_ ? ", persistent decode" : "");
}

CudaRunner::Layout CudaRunner::layout(int64_t n_tok, int64_t n_out, int64_t n_seq, int64_t table_ld,
                                      int64_t n_copies) const {
  Layout l{.n_tok = n_tok, .n_out = n_out, .n_seq = n_seq, .table_ld = table_ld};
  size_t used = 0;
  const auto take = [&](int64_t n, size_t size) {
    const size_t begin = used;
    used += (static_cast<size_t>(n) * size + 255) / 256 * 256;
    return begin;
  };
  l.ids = take(n_tok, 4);
  l.positions = take(n_tok, 4);
  l.slots = take(n_tok, 4);
  l.seq = take(n_tok, 4);
  l.n_key = take(n_tok, 4);
  l.out_rows = take(n_out, 4);
  l.sampling = take(n_out, sizeof(RowSampling));
  l.gather_start = take(n_seq + 1, 4);
  l.table = take(n_seq * table_ld, 4);
  l.prompt_table = l.table;  // set by fill(): behind the decoding sequences' entries
  l.copies = take(3 * n_copies, 4);
  l.end = used;
  return l;
}

CudaRunner::Shape CudaRunner::shape_of(const StepBatch& b) const {
  Shape s;
  int64_t seq = 0;
  bool one_each = true;
  for (; seq < b.n_seq(); seq++) {
    const auto i = static_cast<size_t>(seq);
    const int64_t n = b.cu[i + 1] - b.cu[i];
    if (n > short_rows && !options_.batch_invariant) break;
    one_each &= n == 1;
    s.n_decode += n;
  }
  s.n_prompt = b.n_seq() - seq;
  for (int64_t i = seq; i < b.n_seq(); i++) {
    const auto at = static_cast<size_t>(i);
    s.gather |= b.kv_len[at] > b.cu[at + 1] - b.cu[at];
    s.gather_rows += b.kv_len[at];
  }
  s.plain = !options_.batch_invariant && s.n_prompt == 0 && one_each && b.n_out() == b.n_tok() && !b.hidden &&
            b.n_tok() <= limits_.max_out;
  for (int64_t i = 0; i < b.n_out() && s.plain; i++) s.plain = b.out_rows[static_cast<size_t>(i)] == i;
  return s;
}

void CudaRunner::fill(Slot& slot, const Layout& l, const StepBatch& b, const Shape& shape) {
  const Buffer& block = slot.block;
  put(block, l.ids, b.ids);
  put(block, l.positions, b.positions);
  put(block, l.slots, b.slots);
  for (int64_t t = b.n_tok(); t < l.n_tok; t++) {  // padding: seen by nobody
    in<int32_t>(block, l.ids)[t] = in<int32_t>(block, l.positions)[t] = 0;
    in<int32_t>(block, l.slots)[t] = -1;
  }
  auto *seq = in<int32_t>(block, l.seq), *n_key = in<int32_t>(block, l.n_key);
  std::fill(seq, seq + l.n_tok, 0);
  std::fill(n_key, n_key + l.n_tok, 0);
  for (int64_t s = 0, row = 0; row < shape.n_decode; s++) {
    const auto i = static_cast<size_t>(s);
    const int32_t n = b.cu[i + 1] - b.cu[i];
    for (int32_t j = 0; j < n; j++, row++) {
      seq[row] = static_cast<int32_t>(s);
      n_key[row] = b.kv_len[i] - n + j + 1;
    }
  }
  put(block, l.out_rows, b.out_rows);
  if (!b.hidden) put(block, l.sampling, b.sampling);
  for (int64_t i = b.n_out(); i < l.n_out; i++) {
    in<int32_t>(block, l.out_rows)[i] = 0;
    in<RowSampling>(block, l.sampling)[i] = RowSampling{.temperature = 0};
  }
  int32_t* table = in<int32_t>(block, l.table);
  for (const auto& rows : b.tables) {
    std::copy(rows.begin(), rows.end(), table);
    std::fill(table + rows.size(), table + l.table_ld, 0);
    table += l.table_ld;
  }
  int32_t* start = in<int32_t>(block, l.gather_start);
  start[0] = 0;
  for (int64_t p = 0; p < shape.n_prompt; p++)
    start[p + 1] = start[p] + b.kv_len[static_cast<size_t>(b.n_seq() - shape.n_prompt + p)];
  put_copies(slot, l, b);
}

void CudaRunner::put_copies(Slot& slot, const Layout& l, const StepBatch& b) {
  auto* copies = in<int32_t>(slot.block, l.copies);
  const size_t n = b.copies.size();
  for (size_t i = 0; i < n; i++) {
    copies[i] = b.copies[i].from;
    copies[n + i] = b.copies[i].to;
    copies[2 * n + i] = b.copies[i].count;
  }
}

void CudaRunner::copy_rows(const StepBatch& b, const Layout& l) {
  const auto n = static_cast<int64_t>(b.copies.size());
  if (n == 0) return;
  const InferModel& m = weights_.model();
  const int32_t* lists = at<int32_t>(l.copies);
  int64_t longest = 0;
  for (const RowCopy& c : b.copies) longest = std::max<int64_t>(longest, c.count);
  // Copies of blocks touch different rows; a run may be copied onto one that an earlier copy has left.
  const int64_t at_once = options_.kv_layout == KvLayout::paged ? n : 1;
  for (int64_t i = 0; i < n; i += at_once)
    ops::kv_copy_rows(dev_, kv_, m.n_layer, lists + i, lists + n + i, lists + 2 * n + i, at_once, longest, m.n_kv_head,
                      m.d_head);
}

// Penalties and masks are rare and large: they have buffers of their own.
void CudaRunner::upload_lists(Slot& slot, const StepBatch& b) {
  const auto send = [&](Buffer& host, const Buffer& gpu, const void* from, size_t bytes) {
    if (bytes == 0) return;
    MM_CHECK(bytes <= gpu.size());
    if (host.size() < bytes) host = Buffer(std::min(gpu.size(), std::bit_ceil(bytes)), Memory::pinned);
    std::memcpy(host.data(), from, bytes);
    copy_async(gpu.data(), host.data(), bytes, dev_.stream);
  };
  send(slot.edits, gpu_edits_, b.edits.data(), b.edits.size() * sizeof(LogitEdit));
  send(slot.masks, gpu_masks_, b.masks.data(), b.masks.size() * sizeof(uint32_t));
}

PagedBatch CudaRunner::device_batch(const Layout& l, const StepBatch& b, const Shape& shape) const {
  PagedBatch p{.n_tok = l.n_tok,
               .n_decode = shape.n_prompt == 0 ? l.n_tok : shape.n_decode,
               .n_out = l.n_out,
               .ids = at<int32_t>(l.ids),
               .positions = at<int32_t>(l.positions),
               .slots = at<int32_t>(l.slots),
               .seq = at<int32_t>(l.seq),
               .n_key = at<int32_t>(l.n_key),
               .table = {at<int32_t>(l.table), l.table_ld, b.block_shift},
               .max_key = std::min(limits_.context, l.table_ld << b.block_shift),
               .out_rows = at<int32_t>(l.out_rows),
               .invariant = options_.batch_invariant};
  p.prompt_table = p.table;
  p.prompt_table.rows += (b.n_seq() - shape.n_prompt) * l.table_ld;
  return p;
}

// The step's numbers travel with the launch, and the tables only where they changed: a copy before and behind each step
// costs 10 us.
void CudaRunner::run_persistent(Slot& slot, const StepBatch& b) {
  const auto n = static_cast<size_t>(b.n_tok());
  const size_t ld = persistent_ld();
  std::array<PersistentRow, persistent_rows> rows;
  size_t staged = 0;
  for (size_t i = 0; i < n; i++) {
    rows[i] = {.id = b.ids[i], .position = b.positions[i], .slot = b.slots[i], .kv_len = b.kv_len[i]};
    std::vector<int32_t>& sent = sent_tables_[i];
    const std::vector<int32_t>& now = b.tables[i];
    MM_CHECK(now.size() <= ld);
    const auto [differs, unused] = std::mismatch(now.begin(), now.end(), sent.begin(), sent.end());
    const auto first = static_cast<size_t>(differs - now.begin()), count = now.size() - first;
    if (count == 0) continue;
    auto* host = in<int32_t>(slot.tables, 0) + staged;
    std::copy(differs, now.end(), host);
    copy_async(static_cast<int32_t*>(gpu_tables_.data()) + i * ld + first, host, count * sizeof(int32_t), dev_.stream);
    sent.resize(std::max(sent.size(), now.size()));
    std::copy(differs, now.end(), sent.begin() + static_cast<std::ptrdiff_t>(first));
    staged += count;
  }
  logits_ = View(gpu_logits_.data(), DType::f32, {b.n_tok(), weights_.model().n_vocab});
  persistent_.run(dev_, {.rows = {rows.data(), n},
                         .sampling = b.sampling,
                         .table = static_cast<const int32_t*>(gpu_tables_.data()),
                         .table_ld = static_cast<int64_t>(ld),
                         .block_shift = b.block_shift,
                         .edits = static_cast<const LogitEdit*>(gpu_edits_.data()),
                         .masks = static_cast<const uint32_t*>(gpu_masks_.data()),
                         .prev_ids = static_cast<const int32_t*>(gpu_ids_.data()),
                         .next_ids = static_cast<int32_t*>(gpu_ids_.data()),
                         .next_ids_host = static_cast<int32_t*>(slot.ids.data()),
                         .logits = b.logits_of.empty() ? nullptr : logits_.f32()});
}

size_t CudaRunner::persistent_ld() const {
  return static_cast<size_t>(limits_.context / std::max<int64_t>(1, options_.block_size)) + 1;
}

void CudaRunner::run_graph(const StepBatch& b, const Layout& l, const Shape& shape) {
  PagedBatch p = device_batch(l, b, shape);
  p.out_rows = nullptr;
  p.n_new = 1;  // one token a sequence
  logits_ = scratch_.logits.row_slice(0, l.n_out);
  graphs_.run(dev_, {l.n_tok, l.table_ld}, [&] {
    ops::resolve_ids(dev_, at<int32_t>(l.ids), static_cast<const int32_t*>(gpu_ids_.data()), l.n_tok);
    paged_forward(dev_, weights_, kv_, p, acts_, scratch_, false);
    ops::sample_rows(dev_, static_cast<int32_t*>(gpu_ids_.data()), logits_, at<RowSampling>(l.sampling),
                     static_cast<const LogitEdit*>(gpu_edits_.data()), static_cast<const uint32_t*>(gpu_masks_.data()));
  });
}

void CudaRunner::run_prompts(const StepBatch& b, const Layout& l, Shape shape) {
  PagedBatch p = device_batch(l, b, shape);
  if (shape.n_prompt > 0) {
    // Padding tokens lie behind the last prompt and belong to no sequence.
    prompt_batch_.clear();
    prompt_plan_ = {};
    const auto first = static_cast<size_t>(shape.n_decode), n = static_cast<size_t>(b.n_tok()) - first;
    prompt_batch_.ids.assign(b.ids.begin() + static_cast<std::ptrdiff_t>(first), b.ids.end());
    prompt_batch_.positions.assign(b.positions.begin() + static_cast<std::ptrdiff_t>(first), b.positions.end());
    int32_t start = 0;
    for (auto s = static_cast<size_t>(b.n_seq() - shape.n_prompt); s < static_cast<size_t>(b.n_seq()); s++) {
      prompt_batch_.cu_seqlens.push_back(b.cu[s + 1] - shape.n_decode);
      prompt_plan_.kv_start.push_back(start);
      prompt_plan_.kv_len.push_back(b.kv_len[s]);
      start += b.kv_len[s];
    }
    MM_CHECK(prompt_batch_.ids.size() == n);
    p.prompts = &prompt_stage_.stage(dev_, prompt_batch_, shape.gather ? &prompt_plan_ : nullptr);
    p.gather = shape.gather;
    p.gather_start = at<int32_t>(l.gather_start);
    p.n_prompt = shape.n_prompt;
    p.gather_rows = shape.gather_rows;
  }
  ops::resolve_ids(dev_, at<int32_t>(l.ids), static_cast<const int32_t*>(gpu_ids_.data()), l.n_tok);
  paged_forward(dev_, weights_, kv_, p, acts_, scratch_, b.hidden);
  if (b.hidden || l.n_out == 0) return;
  logits_ = scratch_.logits.row_slice(0, l.n_out);
  ops::sample_rows(dev_, static_cast<int32_t*>(gpu_ids_.data()), logits_, at<RowSampling>(l.sampling),
                   static_cast<const LogitEdit*>(gpu_edits_.data()), static_cast<const uint32_t*>(gpu_masks_.data()));
}

void CudaRunner::submit(const StepBatch& b) {
  MM_CHECK(b.n_tok() > 0 && b.n_tok() <= limits_.max_tok && b.n_out() <= limits_.max_out);
  MM_CHECK(flying_.size() < 2);
  Slot& slot = slots_[turn_];
  slot.fence.wait();
  const Shape shape = shape_of(b);
  if (takes_persistent(b, shape)) {
    if (!b.copies.empty()) {
      const Layout l = layout(0, 0, 0, 0, static_cast<int64_t>(b.copies.size()));
      put_copies(slot, l, b);
      copy_async(gpu_block_.data(), slot.block.data(), l.end, dev_.stream);
      copy_rows(b, l);
    }
    upload_lists(slot, b);
    run_persistent(slot, b);
    finish(slot, b, true);
    return;
  }
  size_t widest = 1;
  for (const auto& t : b.tables) widest = std::max(widest, t.size());
  const auto table_ld = std::max<int64_t>(16, static_cast<int64_t>(std::bit_ceil(widest)));
  const int64_t n_tok = bucket(b.n_tok());
  const int64_t n_out = options_.batch_invariant ? limits_.max_out
                        : shape.plain            ? n_tok
                        : b.n_out() == 0         ? 0
                                                 : std::min(bucket(b.n_out()), limits_.max_out);
  const Layout l = layout(n_tok, n_out, std::max(b.n_seq(), shape.plain ? n_tok : int64_t{0}), table_ld,
                          static_cast<int64_t>(b.copies.size()));
  MM_CHECK(l.end <= gpu_block_.size(), "lists of {} bytes, planned for {}", l.end, gpu_block_.size());
  fill(slot, l, b, shape);
  copy_async(gpu_block_.data(), slot.block.data(), l.end, dev_.stream);
  upload_lists(slot, b);
  copy_rows(b, l);
  if (shape.plain) run_graph(b, l, shape);
  else run_prompts(b, l, shape);
  finish(slot, b, false);
}

// Steps of padding alone: they read and write no keys.
void CudaRunner::warm_up() {
  Progress progress("choosing kernels", limits_.max_tok, "tokens a step");
  StepBatch nothing;
  nothing.block_shift = std::bit_width(static_cast<uint64_t>(options_.block_size - 1));
  for (int64_t n = 1; n <= limits_.max_tok; n = bucket(n) + 1) {
    const bool decodes = n <= limits_.max_seq && !options_.batch_invariant;
    // As submit() lays it out.
    const Layout l = layout(bucket(n), std::min(bucket(n), limits_.max_out), decodes ? bucket(n) : 0, 16, 0);
    MM_CHECK(l.end <= gpu_block_.size());
    Slot& slot = slots_[turn_];
    slot.fence.wait();
    fill(slot, l, nothing, {});
    copy_async(gpu_block_.data(), slot.block.data(), l.end, dev_.stream);
    if (decodes) {
      // Twice: the second time it is captured. The persistent kernel needs no preparation.
      for (int i = 0; i < 2 && !(persistent_ && l.n_tok <= persistent_most_); i++) run_graph(nothing, l, {});
    } else {
      run_prompts(nothing, l, {});
    }
    slot.fence.record(dev_.stream);
    turn_ = (turn_ + 1) % n_slots;
    progress.set(n);
  }
  synchronize(dev_.stream);
}

// Queues the copies of what the host will want. has_ids: the step has written the ids to the slot itself.
void CudaRunner::finish(Slot& slot, const StepBatch& b, bool has_ids) {
  slot.n_out = b.n_out();
  slot.hidden = b.hidden;
  slot.logits_of = b.logits_of;
  const auto n = static_cast<size_t>(b.n_out());
  const auto row_bytes = [](const View& v) { return static_cast<size_t>(v.cols()) * dtype_size(v.dtype); };
  if (b.hidden) {
    const size_t bytes = n * row_bytes(scratch_.normed);
    if (slot.floats.size() < bytes) slot.floats = Buffer(bytes, Memory::pinned);
    copy_async(slot.floats.data(), scratch_.normed.data, bytes, dev_.stream);
  } else if (n > 0 && !has_ids) {
    copy_async(slot.ids.data(), gpu_ids_.data(), n * sizeof(int32_t), dev_.stream);
  }
  if (!b.logits_of.empty()) {
    const size_t row = row_bytes(logits_), bytes = row * b.logits_of.size();
    if (slot.floats.size() < bytes) slot.floats = Buffer(bytes, Memory::pinned);
    for (size_t i = 0; i < b.logits_of.size(); i++)
      copy_async(static_cast<char*>(slot.floats.data()) + i * row,
                 static_cast<char*>(logits_.data) + static_cast<size_t>(b.logits_of[i]) * row, row, dev_.stream);
  }
  slot.dtype = b.hidden ? scratch_.normed.dtype : logits_.dtype;
  slot.fence.record(dev_.stream);
  flying_.push_back(turn_);
  turn_ = (turn_ + 1) % n_slots;
}

static void append_floats(std::vector<float>& to, const void* from, DType type, size_t n) {
  const auto* half = static_cast<const uint16_t*>(from);
  for (size_t i = 0; i < n; i++)
    to.push_back(type == DType::f32    ? static_cast<const float*>(from)[i]
                 : type == DType::bf16 ? bf16_to_float(half[i])
                                       : f16_to_float(half[i]));
}

void CudaRunner::collect(StepResult& result) {
  MM_CHECK(!flying_.empty());
  Slot& slot = slots_[flying_.front()];
  flying_.pop_front();
  slot.fence.wait();
  const auto n = static_cast<size_t>(slot.n_out);
  const InferModel& m = weights_.model();
  result = {};
  if (slot.hidden) {
    append_floats(result.hidden, slot.floats.data(), slot.dtype, n * static_cast<size_t>(m.d_model));
    return;
  }
  const auto* ids = static_cast<const int32_t*>(slot.ids.data());
  result.ids.assign(ids, ids + n);
  append_floats(result.logits, slot.floats.data(), slot.dtype, slot.logits_of.size() * static_cast<size_t>(m.n_vocab));
}

}  // namespace mm
