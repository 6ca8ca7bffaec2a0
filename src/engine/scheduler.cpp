#include "engine/scheduler.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/error.h"

namespace mm {

Scheduler::Scheduler(const SchedulerOptions& options, KvSpace& kv) : options_(options), kv_(kv) {
  MM_CHECK(options.max_sequences > 0 && options.step_tokens >= 1 && options.max_out >= 1);
}

void Scheduler::add(std::unique_ptr<Sequence> sequence) {
  const std::string& client = sequence->request->client;
  // A client that was away does not come back with a claim on everything it did not use.
  const auto active = [&](const std::string& c) {
    const auto of_client = [&](const auto& s) { return s->request->client == c; };
    return std::any_of(waiting_.begin(), waiting_.end(), of_client) ||
           std::any_of(running_.begin(), running_.end(), of_client);
  };
  if (!active(client)) {
    double least = std::numeric_limits<double>::infinity();
    std::erase_if(clients_, [&](const auto& entry) { return !active(entry.first); });
    for (const auto& [name, other] : clients_) least = std::min(least, other.n_tok);
    const double n_tok = clients_.empty() ? 0 : least;
    clients_[client].n_tok = n_tok;
  }
  waiting_.push_back(std::move(sequence));
}

// The priority, raised by waiting since then.
static double level(const Sequence& s, double since, double now, double aging) {
  return std::floor(s.request->priority + (aging > 0 ? std::max(0.0, (now - since) / aging) : 0.0));
}

// Among running ones: who gets rows first. Aging is left out between equals by arrival, which orders them the same way.
bool Scheduler::more_urgent(const Sequence& a, const Sequence& b, double now) const {
  const double x = level(a, a.arrival, now, options_.aging_seconds),
               y = level(b, b.arrival, now, options_.aging_seconds);
  if (x != y) return x > y;
  return a.arrival != b.arrival ? a.arrival < b.arrival : a.admitted < b.admitted;
}

// Since when s waits for a turn of its client.
double Scheduler::turn_wanted_at(const Sequence& s) const {
  if (s.admitted > 0) return s.arrival;  // has had it
  const auto& turns = clients_.at(s.request->client).last_turn;
  const auto turn = turns.find(s.request->priority);
  return turn == turns.end() ? s.arrival : std::max(s.arrival, turn->second);
}

size_t Scheduler::best_waiting(double now) const {
  const auto before = [&](const Sequence& a, double a_since, const Sequence& b, double b_since) {
    const double x = level(a, a_since, now, options_.aging_seconds), y = level(b, b_since, now, options_.aging_seconds);
    const double a_tok = clients_.at(a.request->client).n_tok, b_tok = clients_.at(b.request->client).n_tok;
    return x != y ? x > y : a_tok != b_tok ? a_tok < b_tok : a.arrival < b.arrival;
  };
  std::map<int, size_t> next;  // of each priority
  for (size_t i = 0; i < waiting_.size(); i++) {
    const Sequence& a = *waiting_[i];
    size_t& best = next.try_emplace(a.request->priority, i).first->second;
    const Sequence& b = *waiting_[best];
    if (before(a, turn_wanted_at(a), b, turn_wanted_at(b))) best = i;
  }
  size_t best = next.begin()->second;
  for (const auto& [priority, i] : next) {
    const Sequence &a = *waiting_[i], &b = *waiting_[best];
    if (before(a, a.arrival, b, b.arrival)) best = i;
  }
  return best;
}

std::unique_ptr<Sequence> Scheduler::take(std::vector<std::unique_ptr<Sequence>>& from, const Sequence& s) {
  const auto it = std::find_if(from.begin(), from.end(), [&](const auto& p) { return p.get() == &s; });
  MM_CHECK(it != from.end());
  std::unique_ptr<Sequence> taken = std::move(*it);
  from.erase(it);
  return taken;
}

void Scheduler::admit(double now) {
  rows_scarce_ = false;
  if (options_.static_batch && !running_.empty()) return;
  int64_t places = options_.max_sequences;
  int64_t promised = 0;  // rows that admitted sequences do not hold yet
  for (const auto& s : running_) {
    places -= 1 + s->n_fork;
    promised += std::max<int64_t>(0, kv_.rows_for(s->n_known() + 1) - s->rows.n_row);
  }
  while (!waiting_.empty()) {
    Sequence& s = *waiting_[best_waiting(now)];
    if (1 + s.n_fork > places) return;
    const int64_t held = kv_.match(s.rows, s.tokens, s.n_known() - 1);
    // One row more than its tokens: the first decode step must not put somebody back at once.
    const int64_t need = kv_.rows_for(s.n_known() + 1) - held;
    if (!running_.empty() && need + promised > kv_.free_rows()) {
      kv_.release(s.rows);
      rows_scarce_ = true;
      return;
    }
    promised += need;
    s.n_computed = held;
    if (s.n_preempted == 0) s.cached_tokens = held;
    Client& client = clients_.at(s.request->client);
    if (s.admitted == 0) client.last_turn[s.request->priority] = now;
    s.admitted = ++n_admitted_;
    if (s.admitted_at == 0) s.admitted_at = now;
    places -= 1 + s.n_fork;
    client.n_tok += static_cast<double>(s.n_known() - held);
    running_.push_back(take(waiting_, s));
  }
}

Places Scheduler::places() const {
  Places places;
  const bool closed = options_.static_batch || (rows_scarce_ && !waiting_.empty());
  if (running_.empty() || !closed) {
    places.n_free = options_.max_sequences;
    for (const auto& s : running_) places.n_free -= 1 + s->n_fork;
  }
  for (const auto& s : waiting_) places.take(1 + s->n_fork);
  return places;
}

void Scheduler::put_back(Sequence& s) {
  MM_CHECK(s.n_flying == 0 && !s.finished);
  kv_.release(s.rows);
  s.n_computed = 0;
  s.draft.clear();
  s.n_preempted++;
  n_preempted_++;
  waiting_.push_back(take(running_, s));
}

// running_ is in order of urgency here: victims come from its end, down to the sequence itself. Who is part of this
// step already stays.
bool Scheduler::make_room(Sequence& s, int64_t n_tok, StepPlan& plan, bool in_flight) {
  while (!kv_.grow(s.rows, s.n_computed, n_tok, plan.batch.copies)) {
    if (in_flight) return false;
    const auto planned = [&](const Sequence* v) {
      return std::any_of(plan.items.begin(), plan.items.end(), [&](const StepItem& i) { return i.sequence == v; });
    };
    size_t victim = running_.size() - 1;
    while (running_[victim].get() != &s && planned(running_[victim].get())) victim--;
    const bool self = running_[victim].get() == &s;
    put_back(*running_[victim]);
    if (self) return false;
  }
  return true;
}

void Scheduler::add_item(StepPlan& plan, Sequence& s, int64_t n_tok, int64_t n_row) {
  StepBatch& b = plan.batch;
  plan.items.push_back({&s, s.n_computed, n_tok, b.n_out(), n_row});
  for (int64_t i = 0; i < n_tok; i++) {
    const int64_t at = s.n_computed + i;
    const bool known = at < s.n_known(), draft = !known && s.n_pending == 0;
    b.ids.push_back(known   ? s.tokens[static_cast<size_t>(at)]
                    : draft ? s.draft[static_cast<size_t>(at - s.n_known())]
                            : -1 - s.pending_row);
    b.positions.push_back(static_cast<int32_t>(at));
    b.slots.push_back(kv_.row(s.rows, at));
  }
  b.cu.push_back(static_cast<int32_t>(b.n_tok()));
  b.kv_len.push_back(static_cast<int32_t>(s.n_computed + n_tok));
  kv_.append_table(s.rows, b.tables.emplace_back());
  // One row a choice behind a prompt; else the rows of the last tokens.
  const bool fork = s.n_fork > 0;
  for (int64_t i = 0; i < n_row; i++) b.out_rows.push_back(static_cast<int32_t>(b.n_tok() - (fork ? 1 : n_row - i)));
  s.n_computed += n_tok;
  s.n_flying++;
  if (n_row > 0 && !s.request->embed) {
    s.n_pending++;
    s.pending_row = static_cast<int32_t>(plan.items.back().first_row);
  }
}

// False: no room for anybody behind it either.
bool Scheduler::plan_decode(StepPlan& plan, Sequence& s, int64_t& budget, bool in_flight) {
  if (budget < 1 || plan.batch.n_out() >= options_.max_out) return true;
  if (s.n_pending > 0 && s.n_total() >= s.max_tokens) return true;  // what is under way is its last token
  int64_t n_tok = 1;
  if (s.n_pending == 0)
    n_tok += std::min({static_cast<int64_t>(s.draft.size()), budget - 1, options_.max_out - plan.batch.n_out() - 1,
                       s.max_tokens - s.n_known() - 1});
  if (!make_room(s, s.n_total() + n_tok - 1, plan, in_flight)) return false;
  add_item(plan, s, n_tok, n_tok);
  clients_.at(s.request->client).n_tok += 1;
  budget -= n_tok;
  return true;
}

void Scheduler::plan_prompt(StepPlan& plan, Sequence& s, int64_t& budget, int64_t& keys, bool in_flight) {
  const bool embed = s.request->embed;
  const int64_t rest = s.n_known() - s.n_computed;
  int64_t n_tok = std::min(rest, budget);
  if (embed) n_tok = std::min(n_tok, options_.max_out - plan.batch.n_out());
  const int64_t n_row = embed ? n_tok : n_tok == rest ? 1 + s.n_fork : 0;
  if (n_tok < 1 || plan.batch.n_out() + n_row > options_.max_out) return;
  const int64_t keys_after = keys + s.n_computed + n_tok;
  if (keys > 0 && keys_after > options_.prompt_keys) return;
  if (!make_room(s, s.n_computed + n_tok, plan, in_flight)) return;
  add_item(plan, s, n_tok, n_row);
  budget -= n_tok;
  keys = keys_after;
}

StepPlan Scheduler::plan(double now, bool in_flight) {
  StepPlan plan;
  plan.batch.block_shift = kv_.block_shift();
  admit(now);
  plan.batch.copies = std::move(copies_);
  copies_.clear();
  const auto urgent = [&](const auto& a, const auto& b) { return more_urgent(*a, *b, now); };
  if (!std::is_sorted(running_.begin(), running_.end(), urgent))
    std::stable_sort(running_.begin(), running_.end(), urgent);

  const auto is_embed = [](const auto& s) { return s->request->embed; };
  const auto n_embed = std::count_if(running_.begin(), running_.end(), is_embed);
  turn_of_embeddings_ = n_embed > 0 && (!turn_of_embeddings_ || n_embed == n_running());
  plan.batch.hidden = turn_of_embeddings_;

  // By index: sequences at the end may be put back on the way.
  int64_t budget = options_.step_tokens, prompt_keys = 0;
  const auto decodes = [](const Sequence& s) {
    return s.n_total() - s.n_computed <= 1 && s.n_computed >= s.n_prompt && !s.request->embed;
  };
  const auto skip = [&](const Sequence& s) {
    return s.request->embed != plan.batch.hidden || (s.n_pending > 0 && s.needs_history());
  };
  for (size_t i = 0; i < running_.size(); i++) {
    Sequence& s = *running_[i];
    if (skip(s) || !decodes(s)) continue;
    if (!plan_decode(plan, s, budget, in_flight)) break;
  }
  for (size_t i = 0; i < running_.size() && budget > 0; i++) {
    Sequence& s = *running_[i];
    if (skip(s) || s.n_pending > 0 || s.n_computed >= s.n_known() || decodes(s)) continue;
    plan_prompt(plan, s, budget, prompt_keys, in_flight);
  }
  if (plan.items.empty()) copies_ = std::move(plan.batch.copies);  // no step will do them now
  return plan;
}

Sequence& Scheduler::fork(Sequence& parent, int choice) {
  auto child = std::make_unique<Sequence>();
  child->request_id = parent.request_id;
  child->choice = choice;
  child->request = parent.request;
  child->tokens.assign(parent.tokens.begin(), parent.tokens.begin() + parent.n_prompt);
  child->tokens.reserve(static_cast<size_t>(parent.max_tokens));
  child->n_prompt = parent.n_prompt;
  child->max_tokens = parent.max_tokens;
  child->cached_tokens = parent.cached_tokens;
  child->arrival = parent.arrival;
  child->deadline = parent.deadline;
  child->admitted_at = parent.admitted_at;
  child->admitted = ++n_admitted_;
  MM_CHECK(parent.n_fork > 0);
  parent.n_fork--;
  Sequence& s = *child;
  if (kv_.fork(parent.rows, parent.n_prompt, child->rows, copies_)) {
    child->n_computed = parent.n_prompt;
    running_.push_back(std::move(child));
  } else {
    waiting_.push_back(std::move(child));
  }
  return s;
}

void Scheduler::computed(Sequence& s, int64_t n_tok) { kv_.publish(s.rows, s.tokens, n_tok); }

void Scheduler::finish(Sequence& s) {
  MM_CHECK(!s.finished);
  s.finished = true;
  kv_.release(s.rows);
  const bool waits = std::any_of(waiting_.begin(), waiting_.end(), [&](const auto& p) { return p.get() == &s; });
  finished_.push_back(take(waits ? waiting_ : running_, s));
}

void Scheduler::collected() {
  std::erase_if(finished_, [](const auto& s) { return s->n_flying == 0; });
}

void Scheduler::for_each(const std::function<void(Sequence&, bool)>& f) {
  // Over copies of the lists: f may finish sequences.
  std::vector<std::pair<Sequence*, bool>> all;
  for (const auto& s : waiting_) all.emplace_back(s.get(), false);
  for (const auto& s : running_) all.emplace_back(s.get(), true);
  for (const auto& [s, running] : all) f(*s, running);
}

}  // namespace mm
