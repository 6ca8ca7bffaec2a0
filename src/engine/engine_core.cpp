#include "engine/engine_core.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "engine/ngram_draft.h"

namespace mm {

static KvSpace make_space(const EngineCore::Setup& s) {
  const bool paged = s.options.kv_layout == KvLayout::paged;
  return KvSpace(s.options.kv_layout, s.limits.n_row, paged ? s.options.block_size : s.limits.context,
                 s.options.prefix_cache);
}

EngineCore::EngineCore(const Setup& setup, std::unique_ptr<Runner> runner, std::optional<Tokenizer> tokenizer,
                       std::unique_ptr<DraftModel> draft)
    : setup_(setup),
      runner_(std::move(runner)),
      tokenizer_(std::move(tokenizer)),
      draft_(std::move(draft)),
      kv_(make_space(setup_)),
      scheduler_({.max_sequences = setup_.options.max_sequences,
                  .step_tokens = setup_.limits.max_tok,
                  .static_batch = setup_.options.static_batch,
                  .max_out = setup_.limits.max_out,
                  .prompt_keys = setup_.limits.prompt_keys > 0 ? setup_.limits.prompt_keys : INT64_MAX},
                 kv_),
      start_(now_seconds()) {}

EngineCore::~EngineCore() {
  while (!flying_.empty()) {  // a runner must not be destroyed with a step under way
    runner_->collect(result_);
    flying_.pop_front();
  }
}

void EngineCore::check(const EngineRequest& r, const std::string& prefix) const {
  check_sampling(r.sampling);
  const int64_t context = setup_.limits.context;
  if (r.prompt.empty()) throw Error(prefix + "prompt", "at least one token", "none");
  if (static_cast<int64_t>(r.prompt.size()) >= context) {
    throw Error(prefix + "prompt", fmt::format("at most {} tokens (the context less one)", context - 1),
                fmt::format("{}", r.prompt.size()), "shorten it");
  }
  const auto check_id = [&](const char* field, int32_t id) {
    if (id < 0 || id >= setup_.n_vocab) {
      throw Error(prefix + field, fmt::format("ids in [0, {})", setup_.n_vocab), fmt::format("{}", id),
                  "check that the tokenizer belongs to this model");
    }
  };
  for (const int32_t id : r.prompt) check_id("prompt", id);
  for (const auto& [id, bias] : r.logit_bias) {
    check_id("logit_bias", id);
    if (!(std::abs(bias) <= 1000))
      throw Error(prefix + "logit_bias", "numbers from -1000 to 1000", fmt::format("{}", bias));
  }
  if (r.n < 1 || r.n > setup_.options.max_sequences) {
    throw Error(prefix + "n", fmt::format("1 to {} (sequences at once)", setup_.options.max_sequences),
                fmt::format("{}", r.n));
  }
  if (r.max_new_tokens < 1) throw Error(prefix + "max_tokens", "at least 1", fmt::format("{}", r.max_new_tokens));
  if (r.logprobs > setup_.n_vocab)
    throw Error(prefix + "logprobs", fmt::format("at most {}", setup_.n_vocab), fmt::format("{}", r.logprobs));
  if (!tokenizer_ && !r.stop_strings.empty()) throw Error(prefix + "stop", "a model with a tokenizer", "none");
  if (!tokenizer_ && r.grammar) throw Error(prefix + "response_format", "a model with a tokenizer", "none");
  StopMatcher(r.stop_strings);
}

void EngineCore::start_choice(const Sequence& s) {
  const EngineRequest& r = *s.request;
  Choice& c = choices_[{s.request_id, s.choice}];
  if (r.embed) {
    c.pooled.assign(static_cast<size_t>(setup_.d_model), 0.0);
    return;
  }
  if (tokenizer_) c.decoder.emplace(*tokenizer_, r.skip_special);
  c.stops.emplace(r.stop_strings);
  if (r.grammar) {
    if (!token_table_) {
      std::vector<std::string> bytes(static_cast<size_t>(setup_.n_vocab));
      for (int32_t id = 0; id < std::min<int64_t>(setup_.n_vocab, tokenizer_->vocab_size()); id++)
        if (!tokenizer_->is_special(id)) bytes[static_cast<size_t>(id)] = tokenizer_->token_bytes(id);
      token_table_.emplace(std::move(bytes));
    }
    c.grammar.emplace(r.grammar, *token_table_);
  }
  for (const auto& [id, bias] : r.logit_bias) c.edits[id] = {.id = id, .bias = bias};
  const SamplingParams& p = r.sampling;
  if (p.repetition_penalty != 1.0f)
    for (const int32_t id : r.prompt) c.edits.try_emplace(id, LogitEdit{.id = id}).first->second.seen = 1;
}

void EngineCore::add(uint64_t id, EngineRequest request, double arrival) {
  auto s = std::make_unique<Sequence>();
  s->request_id = id;
  s->tokens = request.prompt;
  s->n_prompt = static_cast<int64_t>(request.prompt.size());
  s->max_tokens =
      request.embed ? s->n_prompt : s->n_prompt + std::min(request.max_new_tokens, setup_.limits.context - s->n_prompt);
  s->tokens.reserve(static_cast<size_t>(s->max_tokens));
  s->n_fork = request.n - 1;
  s->arrival = arrival;
  if (request.deadline_seconds > 0) s->deadline = arrival + request.deadline_seconds;
  s->speculates = (setup_.options.ngram_draft > 0 || draft_) && !request.embed;
  s->request = std::make_shared<const EngineRequest>(std::move(request));
  start_choice(*s);
  scheduler_.add(std::move(s));
}

Choice& EngineCore::choice_of(const Sequence& s) { return choices_.at({s.request_id, s.choice}); }

void EngineCore::send(const Sequence& s, EngineEvent&& event) {
  event.choice = s.choice;
  if (s.request->sink) s.request->sink(std::move(event));
}

void EngineCore::end(Sequence& s, FinishReason reason, EngineEvent& event) {
  const Choice& c = choice_of(s);
  event.finished = true;
  event.finish = reason;
  event.prompt_tokens = s.n_prompt;
  event.completion_tokens = s.n_generated();
  event.cached_tokens = std::min(s.cached_tokens, s.n_prompt);
  event.draft_tokens = c.draft_tokens;
  event.accepted_tokens = c.accepted_tokens;
  const double now = now_seconds();
  event.total_seconds = now - s.arrival;
  event.queue_seconds = (s.admitted_at > 0 ? s.admitted_at : now) - s.arrival;
  event.first_token_seconds = c.first_token_at > 0 ? c.first_token_at - s.arrival : 0;
  if (s.choice == 0) {
    totals_.prompt_tokens += s.n_prompt;
    totals_.cached_tokens += event.cached_tokens;
  }
  count_end(reason);
}

void EngineCore::count_end(FinishReason reason) {
  totals_.n_finished += reason == FinishReason::stop || reason == FinishReason::length;
  totals_.n_cancelled += reason == FinishReason::cancelled;
  totals_.n_timed_out += reason == FinishReason::timeout;
  totals_.n_failed += reason == FinishReason::error;
}

// What the decoder and the stop strings hold back.
static void close_text(Choice& c, EngineEvent& event) {
  if (c.decoder && c.stops) event.text += c.stops->push(c.decoder->flush()) + c.stops->flush();
}

void EngineCore::forget(Sequence& s) {
  if (draft_) draft_->release(s);
  choices_.erase({s.request_id, s.choice});
  scheduler_.finish(s);
}

// Ends a sequence from outside its own tokens, with the choices that were never split off from it.
void EngineCore::stop(Sequence& s, FinishReason reason, const std::string& error) {
  EngineEvent event;
  event.error = error;
  if (error.empty()) close_text(choice_of(s), event);
  end(s, reason, event);
  const auto sink = s.request->sink;
  std::vector<EngineEvent> events(static_cast<size_t>(s.n_fork));
  for (size_t i = 0; i < events.size(); i++) {
    events[i].choice = s.choice + 1 + static_cast<int>(i);
    events[i].error = error;
    events[i].finished = true;
    events[i].finish = reason;
    events[i].prompt_tokens = event.prompt_tokens;
    events[i].queue_seconds = event.queue_seconds;
    events[i].total_seconds = event.total_seconds;
    count_end(reason);
  }
  s.n_fork = 0;
  event.choice = s.choice;
  forget(s);
  if (!sink) return;
  sink(std::move(event));
  for (EngineEvent& e : events) sink(std::move(e));
}

void EngineCore::stop_all(FinishReason reason, const std::string& error,
                          const std::function<bool(const Sequence&)>& which) {
  scheduler_.for_each([&](Sequence& s, bool) {
    if (!s.finished && which(s)) stop(s, reason, error);
  });
}

void EngineCore::cancel(uint64_t id) {
  stop_all(FinishReason::cancelled, "", [&](const Sequence& s) { return s.request_id == id; });
}

void EngineCore::cancel_all() {
  stop_all(FinishReason::cancelled, "", [](const Sequence&) { return true; });
}

void EngineCore::fail_all(const std::string& error) {
  flying_.clear();  // their results will never come
  stop_all(FinishReason::error, error, [](const Sequence&) { return true; });
}

void EngineCore::expire(double now) {
  stop_all(FinishReason::timeout, "", [&](const Sequence& s) { return s.deadline > 0 && now > s.deadline; });
}

void EngineCore::propose_drafts() {
  if (setup_.options.ngram_draft == 0 && !draft_) return;
  std::vector<Sequence*> ready;
  scheduler_.for_each([&](Sequence& s, bool running) {
    if (s.n_flying > 0) return;  // what was proposed is being computed
    s.draft.clear();
    if (!running && draft_) draft_->release(s);
    if (running && s.speculates && s.n_known() - s.n_computed == 1 && s.n_generated() > 0) ready.push_back(&s);
  });
  if (draft_) draft_->propose(ready, setup_.options.draft_tokens);
  for (Sequence* s : ready) {
    if (s->draft.empty()) propose_ngram(s->tokens, setup_.options.ngram_draft, s->draft);
    if (!choice_of(*s).grammar) continue;
    GrammarState ahead = *choice_of(*s).grammar;  // a draft ends where the grammar would not follow
    size_t n = 0;
    while (n < s->draft.size() && ahead.accept(s->draft[n])) n++;
    s->draft.resize(n);
  }
}

// The parameters of one wanted row: the token behind `position`, of choice `choice`, behind n_draft proposed tokens.
void EngineCore::fill_row(StepBatch& batch, const Sequence& s, int choice, int64_t position, int64_t n_draft) {
  const EngineRequest& r = *s.request;
  const SamplingParams& p = r.sampling;
  RowSampling row = plain_row(r, choice, position);
  const Choice& c = choice_of(s);
  const bool counts = p.repetition_penalty != 1.0f || p.presence_penalty != 0 || p.frequency_penalty != 0;
  row.edits_begin = static_cast<int32_t>(batch.edits.size());
  if (n_draft > 0 && counts) {
    auto edits = c.edits;
    for (int64_t i = 0; i < n_draft; i++) {
      const int32_t id = s.draft[static_cast<size_t>(i)];
      LogitEdit& e = edits.try_emplace(id, LogitEdit{.id = id}).first->second;
      e.seen = 1;
      e.count++;
    }
    for (const auto& [id, e] : edits) batch.edits.push_back(e);
  } else {
    for (const auto& [id, e] : c.edits) batch.edits.push_back(e);
  }
  row.edits_end = static_cast<int32_t>(batch.edits.size());
  if (c.grammar) {
    const auto words = static_cast<size_t>((setup_.n_vocab + 31) / 32);
    row.mask = static_cast<int32_t>(batch.masks.size() / words);
    batch.masks.resize(batch.masks.size() + words);
    const std::span<uint32_t> bits(batch.masks.end() - static_cast<std::ptrdiff_t>(words), batch.masks.end());
    if (n_draft > 0) {
      GrammarState ahead = *c.grammar;
      for (int64_t i = 0; i < n_draft; i++) ahead.accept(s.draft[static_cast<size_t>(i)]);
      ahead.mask(bits, r.stop_ids);
    } else {
      c.grammar->mask(bits, r.stop_ids);
    }
  }
  if (r.logprobs >= 0) batch.logits_of.push_back(static_cast<int32_t>(batch.sampling.size()));
  batch.sampling.push_back(row);
}

void EngineCore::fill_sampling(StepPlan& plan) {
  if (plan.batch.hidden) return;
  for (const StepItem& item : plan.items) {
    Sequence& s = *item.sequence;
    const int64_t last = item.first + item.n_tok - 1;
    for (int64_t r = 0; r < item.n_row; r++) {
      if (s.n_fork > 0) fill_row(plan.batch, s, s.choice + static_cast<int>(r), last, 0);
      else fill_row(plan.batch, s, s.choice, last - (item.n_row - 1 - r), s.draft.empty() ? 0 : r);
    }
    if (s.n_fork > 0) continue;
    choice_of(s).draft_tokens += item.n_row > 1 ? item.n_row - 1 : 0;
  }
}

bool EngineCore::take_token(Sequence& s, int32_t id, const float* logits, EngineEvent& event) {
  Choice& c = choice_of(s);
  const EngineRequest& r = *s.request;
  s.tokens.push_back(id);
  totals_.generated_tokens++;
  event.ids.push_back(id);
  if (c.first_token_at == 0) c.first_token_at = now_seconds();
  if (logits != nullptr) {
    std::vector<TokenLogprob> top;
    event.logprobs.push_back(sampler_.logprobs({logits, static_cast<size_t>(setup_.n_vocab)}, id, r.logprobs, top));
    event.top.push_back(std::move(top));
  }
  const SamplingParams& p = r.sampling;
  if (p.repetition_penalty != 1.0f || p.presence_penalty != 0 || p.frequency_penalty != 0) {
    LogitEdit& e = c.edits.try_emplace(id, LogitEdit{.id = id}).first->second;
    e.seen = 1;
    e.count++;
  }
  const bool stop_id = std::find(r.stop_ids.begin(), r.stop_ids.end(), id) != r.stop_ids.end();
  bool complete = false;
  if (c.grammar && !stop_id) {
    if (!c.grammar->accept(id)) {  // drawn through its mask, so this must not happen; it costs nobody else anything
      event.error = fmt::format("token {} does not fit the requested format", id);
      end(s, FinishReason::error, event);
      return false;
    }
    complete = c.grammar->finished();
  }
  if (c.decoder && !stop_id) event.text += c.stops->push(c.decoder->push(id));
  const bool stopped = stop_id || complete || c.stops->matched();
  if (!stopped && s.n_known() < s.max_tokens) return true;
  close_text(c, event);
  end(s, stopped ? FinishReason::stop : FinishReason::length, event);
  return false;
}

void EngineCore::take_rows(StepItem& item, const StepPlan& plan, const StepResult& result) {
  Sequence& s = *item.sequence;
  const auto logits_of = [&](int64_t row) -> const float* {
    const auto& of = plan.batch.logits_of;
    const auto it = std::lower_bound(of.begin(), of.end(), row);
    if (it == of.end() || *it != row) return nullptr;
    return result.logits.data() + (it - of.begin()) * setup_.n_vocab;
  };
  const auto drawn = [&](int64_t row) { return result.ids[static_cast<size_t>(row)]; };
  const char* const broken =
      s.request->grammar != nullptr
          ? "no token of the vocabulary can continue the text within the requested format, or the logits are not finite"
          : "the model's logits are not finite; its weights or its run are broken";
  if (s.n_fork > 0) {  // choices are split off before the first goes on
    std::vector<Sequence*> all = {&s};
    for (int64_t i = 1; i < item.n_row; i++) {
      Sequence& child = scheduler_.fork(s, s.choice + static_cast<int>(i));
      start_choice(child);
      all.push_back(&child);
    }
    scheduler_.computed(s, s.n_prompt);
    for (size_t i = 0; i < all.size(); i++) {
      const int64_t row = item.first_row + static_cast<int64_t>(i);
      if (all[i]->finished) continue;  // cancelled by a sink
      if (drawn(row) < 0) {
        stop(*all[i], FinishReason::error, broken);
        continue;
      }
      EngineEvent event;
      const bool more = take_token(*all[i], drawn(row), logits_of(row), event);
      if (!more) {
        forget(*all[i]);
      }
      send(*all[i], std::move(event));
    }
    return;
  }
  EngineEvent event;
  int64_t taken = 0;
  bool more = true;
  for (int64_t i = 0; i < item.n_row && more; i++) {
    const int32_t id = drawn(item.first_row + i);
    if (id < 0) {
      if (taken > 0) send(s, std::move(event));
      stop(s, FinishReason::error, broken);
      return;
    }
    more = take_token(s, id, logits_of(item.first_row + i), event);
    taken++;
    if (i + 1 < item.n_row && (s.draft.empty() || s.draft[static_cast<size_t>(i)] != id)) break;
  }
  if (item.n_row > 1) {
    // Keys of refused proposals stay in their rows until the next tokens overwrite them.
    s.n_computed = item.first + item.n_tok - item.n_row + taken;
    totals_.draft_tokens += item.n_row - 1;
    totals_.accepted_tokens += taken - 1;
    if (more) choice_of(s).accepted_tokens += taken - 1;
    else event.accepted_tokens += taken - 1;
    scheduler_.computed(s, s.n_computed);
  } else {
    scheduler_.computed(s, std::min(item.first + item.n_tok, s.n_known()));
  }
  if (!more) {
    forget(s);
  }
  send(s, std::move(event));
}

void EngineCore::take_hidden(StepItem& item, const StepPlan&, const StepResult& result) {
  Sequence& s = *item.sequence;
  Choice& c = choice_of(s);
  const auto d = static_cast<size_t>(setup_.d_model);
  for (int64_t r = 0; r < item.n_row; r++) {
    const float* row = result.hidden.data() + static_cast<size_t>(item.first_row + r) * d;
    for (size_t i = 0; i < d; i++) c.pooled[i] += static_cast<double>(row[i]);
  }
  if (item.first + item.n_tok < s.n_prompt) return;
  double norm = 0;
  for (const double x : c.pooled) norm += x * x;
  norm = std::sqrt(norm);
  if (!std::isfinite(norm)) {
    stop(s, FinishReason::error, "the model's hidden states are not finite; its weights or its run are broken");
    return;
  }
  EngineEvent event;
  for (const double x : c.pooled) event.embedding.push_back(static_cast<float>(norm > 0 ? x / norm : 0.0));
  end(s, FinishReason::stop, event);
  forget(s);
  send(s, std::move(event));
}

void EngineCore::collect() {
  runner_->collect(result_);
  StepPlan plan = std::move(flying_.front());
  flying_.pop_front();
  for (StepItem& item : plan.items) {
    Sequence& s = *item.sequence;
    s.n_flying--;
    if (item.n_row > 0 && !s.request->embed) s.n_pending--;
    if (s.finished) continue;
    if (s.request->embed) take_hidden(item, plan, result_);
    else if (item.n_row > 0) take_rows(item, plan, result_);
    else scheduler_.computed(s, item.first + item.n_tok);
  }
  scheduler_.collected();
}

bool EngineCore::step(double now) {
  expire(now);
  scheduler_.collected();
  const auto depth = static_cast<size_t>(runner_->depth());
  if (flying_.size() < depth && !scheduler_.idle()) {
    propose_drafts();
    StepPlan plan = scheduler_.plan(now, !flying_.empty());
    if (!plan.items.empty()) {
      fill_sampling(plan);
      runner_->submit(plan.batch);
      totals_.n_step++;
      totals_.computed_tokens += plan.batch.n_tok();
      flying_.push_back(std::move(plan));
      if (flying_.size() < depth) return true;
    }
  }
  if (flying_.empty()) return false;
  collect();
  return true;
}

void EngineCore::update_weights(const Model& model) {
  MM_CHECK(idle());
  runner_->update(model);
  kv_.forget();
}

EngineStats EngineCore::stats() const {
  EngineStats s = totals_;
  s.n_waiting = scheduler_.n_waiting();
  s.n_running = scheduler_.n_running();
  s.n_preempted = scheduler_.n_preempted();
  s.block_size = kv_.block_size();
  if (const BlockPool* pool = kv_.pool()) {
    s.n_block = pool->n_block();
    s.n_block_used = pool->n_used();
    s.n_block_cached = pool->n_cached();
  }
  s.seconds = now_seconds() - start_;
  return s;
}

BlockMap EngineCore::block_map() {
  BlockMap map;
  map.block_size = kv_.block_size();
  if (const BlockPool* pool = kv_.pool()) {
    map.n_block = pool->n_block();
    map.cached = pool->cached_blocks();
  }
  scheduler_.for_each([&](Sequence& s, bool running) {
    map.owners.push_back({s.request_id, s.choice, s.rows.blocks, s.n_computed, running});
  });
  return map;
}

void EngineCore::check_invariants() {
  kv_.check();
  std::map<int32_t, int64_t> users;
  int64_t n = 0;
  scheduler_.for_each([&](Sequence& s, bool running) {
    n++;
    MM_CHECK(!s.finished && choices_.contains({s.request_id, s.choice}));
    MM_CHECK(running || s.rows.blocks.empty(), "a waiting sequence holds blocks");
    const int64_t proposed = s.n_flying > 0 ? static_cast<int64_t>(s.draft.size()) : 0;
    MM_CHECK(s.n_computed <= s.n_total() + proposed && s.n_computed <= std::max<int64_t>(s.rows.n_row, 0));
    for (const int32_t b : s.rows.blocks) users[b]++;
  });
  if (draft_) draft_->check(n);
  MM_CHECK(choices_.size() == static_cast<size_t>(n));
  if (kv_.pool() == nullptr) return;
  MM_CHECK(static_cast<int64_t>(users.size()) == kv_.pool()->n_used(), "{} blocks have owners, {} are used",
           users.size(), kv_.pool()->n_used());
  for (const auto& [block, count] : users) MM_CHECK(kv_.pool()->users(block) == count);
}

}  // namespace mm
