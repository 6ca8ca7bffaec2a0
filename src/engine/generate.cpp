#include "engine/generate.h"

#include <algorithm>

#include "base/error.h"
#include "base/progress.h"
#include "engine/stop_matcher.h"
#include "kernels/graph_cache.h"
#include "model/forward.h"
#include "model/kv_cache.h"
#include "model/lm_head.h"
#include "tensor/host_copy.h"
#include "text/stream_decoder.h"

namespace mm {

const char* finish_reason_name(FinishReason reason) {
  switch (reason) {
    case FinishReason::stop: return "stop";
    case FinishReason::length: return "length";
    case FinishReason::cancelled: return "cancelled";
  }
  MM_CHECK(false);
  return "";
}

namespace {

// A request in one of the places. Tokens [0, fed) are in the cache; the others wait to be fed.
struct Sequence {
  size_t index = 0;  // of the request
  int64_t slot = 0;
  const GenerateRequest* request = nullptr;
  std::vector<int32_t> tokens;  // prompt and generated
  size_t fed = 0;
  std::optional<StreamDecoder> decoder;
  StopMatcher stops;
  double first_token_at = 0;
  bool done = false;
};

}  // namespace

struct Generator::Impl {
  std::unique_ptr<Model> replica;  // on a GPU
  Model& model;
  std::optional<Tokenizer> tokenizer;
  GeneratorOptions options;
  KvCache cache;
  Activations acts;
  LmHead head;
  Buffer logits_buffer;
  TokenBatch batch;
  Sampler sampler;
  std::vector<TokenLogprob> top;
  std::vector<std::vector<int32_t>> held;  // [slot] ids whose keys and values may be reused
  std::vector<Sequence> active;
  GraphCache graphs;                 // GPU: decode steps by number of sequences
  std::vector<int32_t> rows;         // of the batch, whose logits are wanted
  std::vector<Sequence*> row_owner;  // [rows]

  Impl(Model& m, std::optional<Tokenizer> t, const GeneratorOptions& o)
      : replica(o.device.on_gpu() ? m.replica(o.device, o.context) : nullptr),
        model(replica ? *replica : m),
        tokenizer(std::move(t)),
        options(o),
        cache(m.config, o.max_sequences, o.context, o.device),
        acts(m.config, o.prefill_chunk + o.max_sequences, /*train=*/false, o.device),
        head(m.config, o.device),
        logits_buffer(static_cast<size_t>(o.max_sequences * m.config.vocab_size) * sizeof(float)),
        held(static_cast<size_t>(o.max_sequences)) {}

  void check(const GenerateRequest& r, size_t index) const;
  void admit(const GenerateRequest& r, size_t index, int64_t slot, GenerateResult& result);
  void forward_step();
  void take_token(Sequence& s, std::span<const float> logits, GenerateResult& result, const TokenSink& sink);
};

void Generator::Impl::check(const GenerateRequest& r, size_t index) const {
  const auto where = [&](const char* field) { return fmt::format("request {}: {}", index, field); };
  check_sampling(r.sampling);
  if (r.prompt.empty()) throw Error(where("prompt"), "at least one token", "none");
  if (static_cast<int64_t>(r.prompt.size()) >= options.context) {
    throw Error(where("prompt"), fmt::format("at most {} tokens (the context less one)", options.context - 1),
                fmt::format("{}", r.prompt.size()), "shorten it");
  }
  for (const int32_t id : r.prompt) {
    if (id < 0 || id >= model.config.vocab_size) {
      throw Error(where("prompt"), fmt::format("ids in [0, {})", model.config.vocab_size), fmt::format("{}", id),
                  "check that the tokenizer belongs to this model");
    }
  }
  if (r.max_new_tokens < 1) throw Error(where("new tokens"), "at least 1", fmt::format("{}", r.max_new_tokens));
  if (!tokenizer && !r.stop_strings.empty()) throw Error(where("stop strings"), "a model with a tokenizer", "none");
  StopMatcher(r.stop_strings);
}

void Generator::Impl::admit(const GenerateRequest& r, size_t index, int64_t slot, GenerateResult& result) {
  auto& known = held[static_cast<size_t>(slot)];
  // The last prompt token is always fed: its logits give the first new one.
  const size_t limit = std::min(known.size(), r.prompt.size() - 1);
  size_t common = 0;
  while (common < limit && known[common] == r.prompt[common]) common++;
  cache.truncate(slot, static_cast<int64_t>(common));
  known.clear();  // until the sequence has ended well
  result.cached_tokens = static_cast<int64_t>(common);
  Sequence s{.index = index,
             .slot = slot,
             .request = &r,
             .tokens = r.prompt,
             .fed = common,
             .stops = StopMatcher(r.stop_strings)};
  s.tokens.reserve(
      std::min(static_cast<size_t>(options.context), r.prompt.size() + static_cast<size_t>(r.max_new_tokens)));
  if (tokenizer) s.decoder.emplace(*tokenizer);
  active.push_back(std::move(s));
}

// One forward over what waits: the last token of every sequence that decodes, and prompt tokens within the budget.
// Leaves logits for those in row_owner.
void Generator::Impl::forward_step() {
  batch.clear();
  cache.clear_batch();
  rows.clear();
  row_owner.clear();
  auto budget = static_cast<size_t>(options.prefill_chunk);
  for (Sequence& s : active) {
    size_t n = s.tokens.size() - s.fed;
    if (s.tokens.size() == s.request->prompt.size()) {
      n = std::min(n, budget);
      budget -= n;
    }
    if (n == 0) continue;
    cache.append(batch, s.slot, s.tokens.data() + s.fed, static_cast<int64_t>(n));
    s.fed += n;
    if (s.fed < s.tokens.size()) continue;
    rows.push_back(static_cast<int32_t>(batch.n_tok() - 1));
    row_owner.push_back(&s);
  }
  const Device& dev = options.device;
  const bool decodes = static_cast<int64_t>(rows.size()) == batch.n_tok();
  if (dev.on_gpu() && decodes && batch.n_tok() <= head.max_rows()) {  // one token each, all of them wanted
    check_batch(model, batch, &cache);
    acts.stage.stage(dev, batch, &cache);
    graphs.run(dev, {batch.n_tok(), 0}, [&] {
      forward_staged(dev, model, acts, &cache);
      head.project(dev, model, acts.h);
    });
    const std::vector<float> values = host_floats(dev, head.projected(batch.n_tok()));
    std::copy(values.begin(), values.end(), logits_buffer.f32());
    return;
  }
  forward(dev, model, batch, acts, &cache);
  if (rows.empty()) return;
  const View out(logits_buffer.data(), DType::f32, {static_cast<int64_t>(rows.size()), model.config.vocab_size});
  head.logits(dev, model, acts.h, rows, out);
}

void Generator::Impl::take_token(Sequence& s, std::span<const float> logits, GenerateResult& result,
                                 const TokenSink& sink) {
  const GenerateRequest& r = *s.request;
  const int32_t id = sampler.sample(logits, r.sampling, s.tokens, static_cast<int64_t>(r.prompt.size()), r.stream);
  s.tokens.push_back(id);
  result.ids.push_back(id);
  if (r.logprobs >= 0) {
    result.logprobs.push_back(sampler.logprobs(logits, id, r.logprobs, top));
    result.top.push_back(top);
  }
  std::string text;
  const bool stop_id = std::find(r.stop_ids.begin(), r.stop_ids.end(), id) != r.stop_ids.end();
  if (s.decoder && !stop_id) text = s.stops.push(s.decoder->push(id));
  s.done = stop_id || s.stops.matched() || static_cast<int64_t>(result.ids.size()) >= r.max_new_tokens ||
           static_cast<int64_t>(s.tokens.size()) >= options.context;
  const auto end_text = [&] {
    std::string rest = s.decoder ? s.stops.push(s.decoder->flush()) : "";
    return rest + s.stops.flush();
  };
  if (s.done) {
    text += end_text();
    result.finish = stop_id || s.stops.matched() ? FinishReason::stop : FinishReason::length;
  }
  result.text += text;
  if (sink && !sink(s.index, id, text) && !s.done) {
    s.done = true;
    result.finish = FinishReason::cancelled;
    result.text += end_text();
  }
}

Generator::Generator(Model& model, std::optional<Tokenizer> tokenizer, const GeneratorOptions& options) {
  GeneratorOptions o = options;
  const int64_t limit = model.config.max_position_embeddings;
  if (o.context == 0) o.context = limit;
  if (o.context < 2 || o.context > limit) {
    throw Error("context", fmt::format("2 to {} tokens (the model's max_position_embeddings)", limit),
                fmt::format("{}", o.context));
  }
  if (o.max_sequences < 1 || o.max_sequences > INT32_MAX / o.context) {
    throw Error("sequences at once", fmt::format("1 to {} of {} tokens", INT32_MAX / o.context, o.context),
                fmt::format("{}", o.max_sequences));
  }
  if (o.prefill_chunk < 1) throw Error("prefill chunk", "at least 1 token", fmt::format("{}", o.prefill_chunk));
  o.prefill_chunk = std::min(o.prefill_chunk, o.max_sequences * o.context);
  impl_ = std::make_unique<Impl>(model, std::move(tokenizer), o);
}

Generator::~Generator() = default;

int64_t Generator::context() const { return impl_->options.context; }

std::vector<GenerateResult> Generator::run(std::span<const GenerateRequest> requests, const TokenSink& sink) {
  Impl& g = *impl_;
  for (size_t i = 0; i < requests.size(); i++) g.check(requests[i], i);
  const double start = now_seconds();
  std::vector<GenerateResult> results(requests.size());
  g.active.clear();
  std::vector<int64_t> free_slots;
  for (int64_t slot = g.options.max_sequences - 1; slot >= 0; slot--) free_slots.push_back(slot);
  size_t next = 0;
  while (next < requests.size() || !g.active.empty()) {
    while (next < requests.size() && !free_slots.empty()) {
      g.admit(requests[next], next, free_slots.back(), results[next]);
      free_slots.pop_back();
      next++;
    }
    g.forward_step();
    const auto n_vocab = static_cast<size_t>(g.model.config.vocab_size);
    for (size_t i = 0; i < g.row_owner.size(); i++) {
      Sequence& s = *g.row_owner[i];
      GenerateResult& result = results[s.index];
      g.take_token(s, {g.logits_buffer.f32() + i * n_vocab, n_vocab}, result, sink);
      const double now = now_seconds();
      if (result.ids.size() == 1) {
        s.first_token_at = now;
        result.prefill_seconds = now - start;
      }
      result.decode_seconds = now - s.first_token_at;
      if (!s.done) continue;
      free_slots.push_back(s.slot);
      if (g.options.reuse_prefix) {
        s.tokens.resize(s.fed);
        g.held[static_cast<size_t>(s.slot)] = std::move(s.tokens);
      }
    }
    std::erase_if(g.active, [](const Sequence& s) { return s.done; });
  }
  return results;
}

}  // namespace mm
