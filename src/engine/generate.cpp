#include "engine/generate.h"

#include <algorithm>
#include <exception>

#include "base/error.h"
#include "base/progress.h"
#include "engine/engine_core.h"

namespace mm {

const char* finish_reason_name(FinishReason reason) {
  switch (reason) {
    case FinishReason::stop: return "stop";
    case FinishReason::length: return "length";
    case FinishReason::cancelled: return "cancelled";
    case FinishReason::timeout: return "timeout";
    case FinishReason::error: return "error";
  }
  MM_CHECK(false);
  return "";
}

EngineOptions GeneratorOptions::engine_options(const ModelConfig& config) const {
  if (prefill_chunk < 1) throw Error("prefill chunk", "at least 1 token", fmt::format("{}", prefill_chunk));
  EngineOptions o;
  o.device = device;
  const DType type = device.on_gpu() ? device.act : device.matmul;
  o.weights = weights               ? *weights
              : type == DType::bf16 ? WeightFormat::bf16
              : type == DType::f16  ? WeightFormat::f16
                                    : WeightFormat::f32;
  o.kv_layout = kv_layout;
  o.batch_invariant = batch_invariant;
  o.warm_up = warm_up;
  o.kv = kv ? *kv : type == DType::bf16 ? KvFormat::bf16 : type == DType::f16 ? KvFormat::f16 : KvFormat::f32;
  o.context = context == 0 ? config.max_position_embeddings : context;
  o.max_sequences = max_sequences;
  o.step_tokens = prefill_chunk;
  o.prefix_cache = reuse_prefix;
  o.ngram_draft = ngram_draft;
  const int64_t unit = o.block_size, each = (std::max<int64_t>(o.context, 1) + unit - 1) / unit * unit;
  if (max_sequences >= 1 && max_sequences > INT32_MAX / each) {
    throw Error("sequences at once", fmt::format("1 to {} of {} tokens", INT32_MAX / each, o.context),
                fmt::format("{}", max_sequences));
  }
  o.kv_tokens = std::max<int64_t>(1, max_sequences) * each * (kv_layout == KvLayout::concat ? 3 : 1);
  return o;
}

static std::unique_ptr<EngineCore> make_core(const Model& model, std::optional<Tokenizer> tokenizer,
                                             const EngineOptions& options) {
  const RunnerLimits limits = plan_limits(model.config, options);
  auto runner = make_runner(model, options, limits);
  if (options.warm_up) runner->warm_up();
  return std::make_unique<EngineCore>(
      EngineCore::Setup{options, limits, model.config.vocab_size, model.config.hidden_size}, std::move(runner),
      std::move(tokenizer));
}

Generator::Generator(const Model& model, std::optional<Tokenizer> tokenizer, const GeneratorOptions& options)
    : core_(make_core(model, std::move(tokenizer), options.engine_options(model.config))) {}

Generator::~Generator() = default;

int64_t Generator::context() const { return core_->setup().limits.context; }

void Generator::update_weights(const Model& model) { core_->update_weights(model); }

static EngineRequest engine_request(const GenerateRequest& r) {
  EngineRequest e;
  e.prompt = r.prompt;
  e.sampling = r.sampling;
  e.stream = r.stream;
  e.max_new_tokens = r.max_new_tokens;
  e.stop_ids = r.stop_ids;
  e.stop_strings = r.stop_strings;
  e.logprobs = r.logprobs;
  e.grammar = r.grammar;
  return e;
}

std::vector<GenerateResult> Generator::run(std::span<const GenerateRequest> requests, const TokenSink& sink) {
  std::vector<EngineRequest> all;
  for (size_t i = 0; i < requests.size(); i++) {
    all.push_back(engine_request(requests[i]));
    core_->check(all.back(), fmt::format("request {}: ", i));
  }
  const double start = now_seconds();
  std::vector<GenerateResult> results(requests.size());
  std::vector<double> first_at(requests.size(), 0.0);
  std::vector<uint64_t> to_cancel;
  std::exception_ptr failure;
  const uint64_t first_id = next_id_;
  const auto take = [&](size_t i, EngineEvent&& e) {
    GenerateResult& result = results[i];
    const bool cancelled = std::find(to_cancel.begin(), to_cancel.end(), first_id + i) != to_cancel.end();
    if (!e.error.empty() && !failure)
      failure = std::make_exception_ptr(Error(fmt::format("request {}", i), "finite logits", e.error));
    if (!e.ids.empty() && !cancelled) {
      const double now = now_seconds();
      if (result.ids.empty()) {
        first_at[i] = now;
        result.prefill_seconds = now - start;
      }
      result.decode_seconds = now - first_at[i];
      result.ids.insert(result.ids.end(), e.ids.begin(), e.ids.end());
      result.logprobs.insert(result.logprobs.end(), e.logprobs.begin(), e.logprobs.end());
      for (auto& top : e.top) result.top.push_back(std::move(top));
    }
    result.text += e.text;
    for (size_t t = 0; t < e.ids.size() && sink && !cancelled && !failure; t++) {
      try {
        const bool last = t + 1 == e.ids.size();
        if (sink(i, e.ids[t], last ? std::string_view(e.text) : std::string_view()) || e.finished) continue;
        to_cancel.push_back(first_id + i);
        break;
      } catch (...) {
        failure = std::current_exception();
      }
    }
    if (!e.finished) return;
    result.finish = e.finish;
    result.cached_tokens = e.cached_tokens;
    result.draft_tokens = e.draft_tokens;
    result.accepted_tokens = e.accepted_tokens;
  };
  for (size_t i = 0; i < all.size(); i++) {
    all[i].sink = [&take, i](EngineEvent&& e) { take(i, std::move(e)); };
    core_->add(next_id_++, std::move(all[i]), start);
  }
  size_t n_cancelled = 0;
  while (!core_->idle()) {
    core_->step();
    while (n_cancelled < to_cancel.size()) core_->cancel(to_cancel[n_cancelled++]);
    if (failure) core_->cancel_all();
  }
  if (failure) std::rethrow_exception(failure);
  return results;
}

}  // namespace mm
