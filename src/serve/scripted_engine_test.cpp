// The engine of this folder's test program: the class Engine of this file takes the place of the library's at link time
// and does what the test's script says.
#include "serve/server_test_fixture.h"

namespace mm {

Script* script;

struct Engine::Impl {
  EngineOptions options;
};
Engine::Engine(const Model&, std::optional<Tokenizer>, const EngineOptions&, const Model*) : impl_(new Impl) {}
Engine::~Engine() = default;
Submitted Engine::submit(EngineRequest request) {
  Script& s = *script;
  std::unique_lock lock(s.mutex);
  if (!s.refuse.empty()) throw Error(s.refuse);
  if (s.status != SubmitStatus::accepted) return {.status = s.status, .retry_after_seconds = 2.5};
  s.requests.push_back(request);
  const uint64_t id = s.requests.size();
  s.changed.notify_all();
  lock.unlock();
  s.play(request);
  return {.id = id};
}
void Engine::cancel(uint64_t id) {
  const std::lock_guard lock(script->mutex);
  script->cancelled.push_back(id);
  script->changed.notify_all();
}
void Engine::drain(double) {
  const std::lock_guard lock(script->mutex);
  script->drained = true;
  script->status = SubmitStatus::stopping;
}
EngineStats Engine::stats() const { return {}; }
BlockMap Engine::block_map() const {
  return {.n_block = 4, .block_size = 16, .owners = {{7, 0, {2, 3}, 20, true}}, .cached = {1}};
}
int64_t Engine::context() const { return 256; }
std::string Engine::description() const { return "scripted"; }
const EngineOptions& Engine::options() const { return impl_->options; }

}  // namespace mm
