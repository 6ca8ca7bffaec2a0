#include "engine/draft_model.h"

#include <algorithm>

#include "base/error.h"

namespace mm {

RowSampling plain_row(const EngineRequest& r, int choice, int64_t position) {
  return sampling_of(r.sampling, r.stream + static_cast<uint64_t>(choice), static_cast<uint64_t>(position + 1));
}

DraftModel::DraftModel(std::unique_ptr<Runner> runner, const RunnerLimits& limits, int64_t block_size)
    : runner_(std::move(runner)), limits_(limits), kv_(KvLayout::paged, limits.n_row, block_size, false) {}

void DraftModel::release(const Sequence& s) {
  const auto it = states_.find(&s);
  if (it == states_.end()) return;
  kv_.release(it->second.rows);
  states_.erase(it);
}

void DraftModel::check(int64_t n_sequence) const {
  kv_.check();
  MM_CHECK(static_cast<int64_t>(states_.size()) <= n_sequence);
}

bool DraftModel::reserve(State& state, int64_t n_tok) {
  return n_tok <= limits_.context && kv_.grow(state.rows, state.n_computed, n_tok, copies_);
}

// One token more for each sequence, behind its tokens and what is proposed so far; long texts that this model has not
// seen yet are read in several steps.
void DraftModel::step(std::span<Sequence* const> sequences) {
  std::vector<int64_t> totals;  // before this step's draws
  for (const Sequence* s : sequences) totals.push_back(s->n_known() + static_cast<int64_t>(s->draft.size()));
  for (bool read = true; read;) {
    read = false;
    StepBatch b;
    b.block_shift = kv_.block_shift();
    std::vector<Sequence*> drawn;
    for (size_t i = 0; i < sequences.size(); i++) {
      Sequence* s = sequences[i];
      State& state = states_.at(s);
      const int64_t total = totals[i];
      const int64_t n = std::min(total - state.n_computed, limits_.max_tok - b.n_tok());
      if (n <= 0) {
        read |= total > state.n_computed;
        continue;
      }
      for (int64_t at = state.n_computed; at < state.n_computed + n; at++) {
        b.ids.push_back(at < s->n_known() ? s->tokens[static_cast<size_t>(at)]
                                          : s->draft[static_cast<size_t>(at - s->n_known())]);
        b.positions.push_back(static_cast<int32_t>(at));
        b.slots.push_back(kv_.row(state.rows, at));
      }
      state.n_computed += n;
      b.cu.push_back(static_cast<int32_t>(b.n_tok()));
      b.kv_len.push_back(static_cast<int32_t>(state.n_computed));
      kv_.append_table(state.rows, b.tables.emplace_back());
      if (state.n_computed < total) {
        read = true;
        continue;
      }
      b.out_rows.push_back(static_cast<int32_t>(b.n_tok() - 1));
      b.sampling.push_back(plain_row(*s->request, s->choice, total - 1));
      drawn.push_back(s);
    }
    if (b.n_tok() == 0) return;
    StepResult result;
    runner_->submit(b);
    runner_->collect(result);
    for (size_t i = 0; i < drawn.size(); i++)
      if (result.ids[i] >= 0) drawn[i]->draft.push_back(result.ids[i]);
  }
}

void DraftModel::propose(std::span<Sequence* const> sequences, int64_t k) {
  std::vector<Sequence*> able;
  for (Sequence* s : sequences) {
    s->draft.clear();
    State& state = states_[s];
    // Of what was proposed before, the tokens that were refused have no keys any more.
    state.n_computed = std::min(state.n_computed, s->n_known() - 1);
    const int64_t room = std::min(limits_.context, s->max_tokens) - s->n_known();
    if (room > 0 && reserve(state, s->n_known() + std::min(k, room))) able.push_back(s);
  }
  for (int64_t i = 0; i < k && !able.empty(); i++) {
    step(able);
    std::erase_if(able, [&](const Sequence* s) {
      return static_cast<int64_t>(s->draft.size()) <= i ||
             s->n_known() + i + 1 >= std::min(limits_.context, s->max_tokens);
    });
  }
}

}  // namespace mm
