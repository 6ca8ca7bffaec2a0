#include "data/loader.h"

#include <charconv>
#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>

#include "base/error.h"
#include "base/fs.h"

namespace mm {

ordered_json LoaderCursor::to_json() const {
  return {{"epoch", epoch}, {"index", index}, {"plan", fmt::format("{:016x}", plan)}};
}

LoaderCursor LoaderCursor::from_json(const ordered_json& j, const std::string& where) {
  LoaderCursor c;
  c.epoch = json_get<int64_t>(j, "epoch", where);
  c.index = json_get<int64_t>(j, "index", where);
  const auto plan = json_get<std::string>(j, "plan", where);
  const auto [end, error] = std::from_chars(plan.data(), plan.data() + plan.size(), c.plan, 16);
  if (error != std::errc{} || end != plan.data() + plan.size()) {
    throw Error(where + ": field \"plan\"", "a hexadecimal number", plan);
  }
  if (c.epoch < 0 || c.index < 0) throw Error(where, "a data position of at least 0", "a negative one");
  return c;
}

void append_row(const TokenDataset& data, int64_t row, int64_t pad_to, int32_t pad_id, TokenBatch& b) {
  thread_local std::vector<int32_t> ids;
  thread_local std::vector<uint8_t> is_target;
  data.row(row, ids, is_target);
  if (b.cu_seqlens.empty()) b.cu_seqlens.push_back(0);
  const size_t n = ids.size();
  for (size_t t = 0; t < n; t++) {
    const bool wanted = t + 1 < n && is_target[t + 1] != 0;
    b.ids.push_back(ids[t]);
    b.positions.push_back(static_cast<int32_t>(t));
    b.targets.push_back(wanted ? ids[t + 1] : -1);
    b.loss_weight.push_back(wanted ? 1.0f : 0.0f);
  }
  for (int64_t t = static_cast<int64_t>(n); t < pad_to; t++) {
    b.ids.push_back(pad_id);
    b.positions.push_back(static_cast<int32_t>(t));
    b.targets.push_back(-1);
    b.loss_weight.push_back(0.0f);
  }
  b.cu_seqlens.push_back(static_cast<int32_t>(b.ids.size()));
  b.sample.push_back(row);
}

struct BatchLoader::Impl {
  struct Ready {
    TokenBatch batch;
    LoaderCursor after;  // the place of the batch behind this one
    int64_t epoch = 0;
  };
  static constexpr size_t ahead = 3;

  TokenDataset data;
  LoaderOptions options;
  std::vector<int32_t> row_len;
  uint64_t plan_hash = 0;
  int64_t first_epoch_batches = 0;

  // Of the consumer.
  LoaderCursor place;
  int64_t last_epoch = 0;

  // Shared with the worker, under the lock.
  std::mutex lock;
  std::condition_variable changed;
  std::deque<Ready> ready;
  std::exception_ptr failure;
  bool stop = false;
  std::thread worker;

  // Of the worker while it runs, of the consumer otherwise.
  EpochPlan plan;
  int64_t plan_epoch_number = -1;

  Impl(const TokenDataset& d, const LoaderOptions& o) : data(d), options(o) {}

  void require_plan(int64_t epoch) {
    if (plan_epoch_number == epoch) return;
    plan = plan_epoch(row_len, options, epoch);
    plan_epoch_number = epoch;
  }

  // Makes the batch at `at` and moves `at` on.
  void make(LoaderCursor& at, Ready& out) {
    require_plan(at.epoch);
    out.batch.clear();
    out.epoch = at.epoch;
    const int64_t begin = plan.batch_begin[static_cast<size_t>(at.index)],
                  end = plan.batch_begin[static_cast<size_t>(at.index) + 1];
    for (int64_t i = begin; i < end; i++) {
      append_row(data, plan.rows[static_cast<size_t>(i)], options.packed ? 0 : options.seq_len, options.pad_id,
                 out.batch);
    }
    if (++at.index == plan.batches()) {
      at.epoch++;
      at.index = 0;
    }
    out.after = at;
  }

  void work(LoaderCursor at) {
    try {
      for (;;) {
        Ready next;
        make(at, next);
        std::unique_lock hold(lock);
        changed.wait(hold, [&] { return stop || ready.size() < ahead; });
        if (stop) return;
        ready.push_back(std::move(next));
        changed.notify_all();
      }
    } catch (...) {
      const std::lock_guard hold(lock);
      failure = std::current_exception();
      changed.notify_all();
    }
  }

  void start() {
    stop = false;
    failure = nullptr;
    ready.clear();
    worker = std::thread([this, at = place] { work(at); });
  }
  void join() {
    if (!worker.joinable()) return;
    {
      const std::lock_guard hold(lock);
      stop = true;
    }
    changed.notify_all();
    worker.join();
  }
};

BatchLoader::BatchLoader(const TokenDataset& data, const LoaderOptions& o) : impl_(std::make_unique<Impl>(data, o)) {
  Impl& s = *impl_;
  if (data.rows() == 0) throw Error("data set", "at least one row", "none");
  if (o.batch_size < 1 || o.seq_len < 1 || o.batch_size > INT32_MAX / o.seq_len) {
    throw Error("batch_size and seq_len", "a batch of 1 to 2147483647 tokens",
                fmt::format("{} x {}", o.batch_size, o.seq_len));
  }
  s.row_len.resize(static_cast<size_t>(data.rows()));
  for (int64_t i = 0; i < data.rows(); i++) {
    if (data.row_len(i) > o.seq_len) {
      throw Error(data.source_text(i), fmt::format("rows of at most seq_len = {} tokens", o.seq_len),
                  fmt::format("one of {}", data.row_len(i)), "build the data set with max_len up to seq_len");
    }
    s.row_len[static_cast<size_t>(i)] = static_cast<int32_t>(data.row_len(i));
  }
  s.plan_hash = hash_bytes(fmt::format("{:x} {} {} {} {} {} {}", data.fingerprint(), o.batch_size, o.seq_len, o.packed,
                                       o.shuffle, o.seed, pack_window));
  s.place.plan = s.plan_hash;
  s.require_plan(0);
  s.first_epoch_batches = s.plan.batches();
}

BatchLoader::~BatchLoader() { impl_->join(); }

void BatchLoader::next(TokenBatch& batch) {
  Impl& s = *impl_;
  if (!s.worker.joinable()) s.start();  // only now: a seek before the first next() costs no work
  std::unique_lock hold(s.lock);
  s.changed.wait(hold, [&] { return !s.ready.empty() || s.failure; });
  if (s.ready.empty()) std::rethrow_exception(s.failure);
  std::swap(batch, s.ready.front().batch);
  s.place = s.ready.front().after;
  s.last_epoch = s.ready.front().epoch;
  s.ready.pop_front();
  s.changed.notify_all();
}

LoaderCursor BatchLoader::cursor() const { return impl_->place; }

void BatchLoader::seek(const LoaderCursor& cursor) {
  Impl& s = *impl_;
  if (cursor.plan != 0 && cursor.plan != s.plan_hash) {
    throw Error("data position", "the data and batch options that it was saved with", "others",
                "resume with the same files, tokenizer, lengths, batch size and seed");
  }
  s.join();
  s.require_plan(cursor.epoch);
  if (cursor.epoch < 0 || cursor.index < 0 || cursor.index >= s.plan.batches()) {
    throw Error("data position", fmt::format("a batch below {}", s.plan.batches()), fmt::format("{}", cursor.index));
  }
  s.place = {cursor.epoch, cursor.index, s.plan_hash};
  s.start();
}

int64_t BatchLoader::batches_per_epoch() const { return impl_->first_epoch_batches; }
int64_t BatchLoader::batches_in_epoch(int64_t epoch) const {
  return epoch == 0 ? impl_->first_epoch_batches : plan_epoch(impl_->row_len, impl_->options, epoch).batches();
}
int64_t BatchLoader::epoch_of_last() const { return impl_->last_epoch; }

bool SequentialBatches::next(TokenBatch& batch) {
  batch.clear();
  while (at_ < data_.rows() && (batch.n_seq() == 0 || batch.n_tok() + data_.row_len(at_) <= max_tokens_)) {
    append_row(data_, at_++, 0, 0, batch);
  }
  return batch.n_seq() > 0;
}

}  // namespace mm
