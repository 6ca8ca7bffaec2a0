#include "engine/engine.h"

#include <atomic>
#include <condition_variable>
#include <future>
#include <mutex>
#include <thread>

#include "base/error.h"
#include "base/log.h"
#include "base/progress.h"
#include "base/thread_team.h"
#include "engine/engine_core.h"

namespace mm {

static std::unique_ptr<DraftModel> make_draft(const ModelConfig& config, const EngineOptions& options,
                                              RunnerLimits limits, const Model* draft) {
  if ((draft != nullptr) != (options.draft_tokens > 0))
    throw Error("draft tokens", "a draft model and a number of tokens above 0, or neither",
                draft != nullptr ? "a model alone" : "a number alone");
  if (draft == nullptr) return nullptr;
  if (draft->config.vocab_size != config.vocab_size)
    throw Error("draft model", fmt::format("a vocabulary of {}", config.vocab_size),
                fmt::format("{}", draft->config.vocab_size), "take a model with the same tokenizer");
  EngineOptions o = options;
  o.kv_layout = KvLayout::paged;
  limits.context = std::min(limits.context, draft->config.max_position_embeddings);
  const int64_t each = (limits.context + o.block_size - 1) / o.block_size * o.block_size;
  limits.n_row = std::max(each, std::min(o.max_sequences * each, limits.n_row / o.block_size * o.block_size));
  return std::make_unique<DraftModel>(make_runner(*draft, o, limits), limits, o.block_size);
}

struct Engine::Impl {
  struct Arrived {
    uint64_t id;
    double at;
    EngineRequest request;
  };

  EngineOptions options;
  std::unique_ptr<EngineCore> core;  // of the thread alone, once it runs
  std::string description;
  int64_t context;

  mutable std::mutex mutex;
  std::condition_variable work, done;
  std::vector<Arrived> inbox;
  std::vector<uint64_t> cancelled;
  std::vector<std::promise<BlockMap>> map_wanted;
  EngineStats stats;
  bool stopping = false, quit = false, idle = true, broken = false;
  int64_t n_submitted = 0, n_rejected = 0, n_waiting = 0;  // n_waiting: inside the core
  Places places;                                           // as the last step left them, less what was submitted since
  uint64_t next_id = 1;
  std::thread thread;

  void run();
  bool take_orders();
};

// Moves what other threads asked for into the core. False: the engine ends.
bool Engine::Impl::take_orders() {
  std::vector<Arrived> arrived;
  std::vector<uint64_t> gone;
  std::vector<std::promise<BlockMap>> maps;
  {
    std::unique_lock lock(mutex);
    if (core->idle() && inbox.empty() && cancelled.empty() && map_wanted.empty() && !quit) {
      idle = true;
      done.notify_all();
      work.wait(lock, [&] { return !inbox.empty() || !cancelled.empty() || !map_wanted.empty() || quit; });
    }
    idle = false;
    arrived.swap(inbox);
    gone.swap(cancelled);
    maps.swap(map_wanted);
    n_waiting += static_cast<int64_t>(arrived.size());
    if (quit) core->cancel_all();
  }
  for (Arrived& a : arrived) core->add(a.id, std::move(a.request), a.at);
  if (broken) core->fail_all("the engine has stopped");
  for (const uint64_t id : gone) core->cancel(id);
  for (auto& m : maps) m.set_value(core->block_map());
  const std::lock_guard lock(mutex);
  if (quit) core->cancel_all();
  return !quit || !core->idle();
}

void Engine::Impl::run() {
  while (take_orders()) {
    try {
      core->step();
    } catch (const std::exception& e) {  // of the device: no later step would end better
      log_error("the engine has stopped: {}", e.what());
      core->fail_all(e.what());
      const std::lock_guard lock(mutex);
      stopping = broken = true;
    }
    const std::lock_guard lock(mutex);
    stats = core->stats();
    n_waiting = stats.n_waiting;
    places = core->places();
    for (const Arrived& a : inbox) places.take(a.request.n);
  }
  const std::lock_guard lock(mutex);
  idle = true;
  done.notify_all();
}

Engine::Engine(const Model& model, std::optional<Tokenizer> tokenizer, const EngineOptions& options, const Model* draft)
    : impl_(std::make_unique<Impl>()) {
  Impl& e = *impl_;
  e.options = options;
  const RunnerLimits limits = plan_limits(model.config, options);
  auto runner = make_runner(model, options, limits);
  if (options.warm_up) runner->warm_up();
  e.core = std::make_unique<EngineCore>(
      EngineCore::Setup{options, limits, model.config.vocab_size, model.config.hidden_size}, std::move(runner),
      std::move(tokenizer), make_draft(model.config, options, limits, draft));
  e.context = limits.context;
  e.stats = e.core->stats();
  e.places = e.core->places();
  const int64_t unit = options.kv_layout == KvLayout::paged ? options.block_size : limits.context;
  e.description = fmt::format("{}, {} cache of {} x {} tokens", e.core->runner().description(),
                              kv_layout_name(options.kv_layout), limits.n_row / unit, unit);
  release_team();  // from here on the engine's thread computes
  e.thread = std::thread([&e] { e.run(); });
}

Engine::~Engine() {
  {
    const std::lock_guard lock(impl_->mutex);
    impl_->quit = impl_->stopping = true;
  }
  impl_->work.notify_all();
  impl_->thread.join();
}

Submitted Engine::submit(EngineRequest request) {
  Impl& e = *impl_;
  e.core->check(request);  // reads what never changes
  const std::lock_guard lock(e.mutex);
  if (e.stopping) {
    e.n_rejected++;
    return {.status = SubmitStatus::stopping};
  }
  if (!e.places.fits(request.n) && e.places.n_stuck >= e.options.queue_limit) {
    e.n_rejected++;
    const int64_t waiting = e.n_waiting + static_cast<int64_t>(e.inbox.size());
    // The time in which as many requests as wait have ended, at the pace so far.
    const double pace = static_cast<double>(std::max<int64_t>(1, e.stats.n_finished)) / std::max(1.0, e.stats.seconds);
    return {.status = SubmitStatus::queue_full,
            .retry_after_seconds = std::min(60.0, std::max(1.0, static_cast<double>(waiting) / pace / 4))};
  }
  e.places.take(request.n);
  const uint64_t id = e.next_id++;
  e.n_submitted++;
  e.inbox.push_back({id, now_seconds(), std::move(request)});
  e.work.notify_one();
  return {.status = SubmitStatus::accepted, .id = id};
}

void Engine::cancel(uint64_t id) {
  const std::lock_guard lock(impl_->mutex);
  impl_->cancelled.push_back(id);
  impl_->work.notify_one();
}

void Engine::drain(double seconds) {
  Impl& e = *impl_;
  std::unique_lock lock(e.mutex);
  e.stopping = true;
  const auto empty = [&] { return e.idle && e.inbox.empty(); };
  if (e.done.wait_for(lock, std::chrono::duration<double>(seconds), empty)) return;
  e.quit = true;
  e.work.notify_all();
  e.done.wait(lock, empty);
}

EngineStats Engine::stats() const {
  const std::lock_guard lock(impl_->mutex);
  EngineStats s = impl_->stats;
  s.n_submitted = impl_->n_submitted;
  s.n_rejected = impl_->n_rejected;
  s.n_waiting = impl_->n_waiting + static_cast<int64_t>(impl_->inbox.size());
  return s;
}

BlockMap Engine::block_map() const {
  std::future<BlockMap> map;
  {
    const std::lock_guard lock(impl_->mutex);
    if (impl_->quit) return {};
    map = impl_->map_wanted.emplace_back().get_future();
    impl_->work.notify_one();
  }
  try {
    return map.get();
  } catch (const std::future_error&) {  // the engine ended first
    return {};
  }
}

int64_t Engine::context() const { return impl_->context; }
std::string Engine::description() const { return impl_->description; }
const EngineOptions& Engine::options() const { return impl_->options; }

}  // namespace mm
