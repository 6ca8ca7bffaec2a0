#include "lab/bench_infer.h"

#include <algorithm>
#include <condition_variable>
#include <mutex>

#include "base/cpu_features.h"
#include "base/error.h"
#include "base/progress.h"
#include "base/rng.h"
#include "base/thread_team.h"
#include "engine/engine.h"
#include "engine/runner.h"
#include "kernels/machine.h"
#include "model/cost.h"

namespace mm {

namespace {

// When each sequence of a round got its tokens.
struct Trace {
  std::mutex mutex;
  std::condition_variable all_finished;
  std::vector<std::vector<double>> times;  // [sequence][token]
  size_t n_finished = 0;
  std::string error;
};

// Submits `batch` requests of random ids at once and waits for them. Seconds count from the first submission.
void run_round(Engine& engine, int64_t n_vocab, int64_t batch, int64_t n_prompt, int64_t n_new, bool sampled,
               uint64_t seed, Trace& trace) {
  trace.times.assign(static_cast<size_t>(batch), {});
  trace.n_finished = 0;
  std::vector<EngineRequest> requests(static_cast<size_t>(batch));
  Rng rng{seed, 0, 0};
  for (EngineRequest& r : requests) {
    for (int64_t i = 0; i < n_prompt; i++)
      r.prompt.push_back(static_cast<int32_t>(rng.below(static_cast<uint64_t>(n_vocab))));
    r.sampling.greedy = !sampled;
    r.max_new_tokens = n_new;
  }
  const double start = now_seconds();
  for (size_t i = 0; i < requests.size(); i++) {
    requests[i].sink = [&trace, i, start](EngineEvent&& e) {
      const double t = now_seconds() - start;
      const std::lock_guard lock(trace.mutex);
      trace.times[i].insert(trace.times[i].end(), e.ids.size(), t);
      if (!e.finished) return;
      if (e.finish == FinishReason::error) trace.error = e.error;
      if (++trace.n_finished == trace.times.size()) trace.all_finished.notify_all();
    };
    MM_CHECK(engine.submit(std::move(requests[i])).status == SubmitStatus::accepted);
  }
  std::unique_lock lock(trace.mutex);
  trace.all_finished.wait(lock, [&] { return trace.n_finished == trace.times.size(); });
  if (!trace.error.empty()) throw Error(trace.error);
}

// Tokens a second while all sequences decode: behind the last first token, up to the first last one. 0 where they never
// did: this thread was held up between the requests.
double decode_speed(const Trace& trace) {
  double begin = 0, end = INFINITY;
  for (const auto& t : trace.times) {
    begin = std::max(begin, t.front());
    end = std::min(end, t.back());
  }
  int64_t n = 0;
  for (const auto& t : trace.times)
    n += std::count_if(t.begin(), t.end(), [&](double x) { return x > begin && x <= end; });
  return end > begin ? static_cast<double>(n) / (end - begin) : 0;
}

struct Spread {
  double median, lowest, highest;
};

Spread spread_of(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  const size_t n = v.size();
  return {n % 2 == 1 ? v[n / 2] : (v[n / 2 - 1] + v[n / 2]) / 2, v.front(), v.back()};
}

EngineOptions fitting(const InferBenchOptions& o, const ModelConfig& config, int64_t n_new) {
  EngineOptions e = o.engine;
  const int64_t batch = *std::max_element(o.batch.begin(), o.batch.end());
  const int64_t wanted = *std::max_element(o.length.begin(), o.length.end()) + n_new + 1;
  if (e.context == 0) e.context = wanted;
  if (wanted > e.context || wanted > config.max_position_embeddings)
    throw Error("length",
                fmt::format("at most {} tokens with {} new ones in the context of {}",
                            std::min(e.context, config.max_position_embeddings) - n_new - 1, n_new,
                            std::min(e.context, config.max_position_embeddings)),
                fmt::format("{}", wanted - n_new - 1));
  e.max_sequences = std::max(e.max_sequences, batch);
  e.queue_limit = std::max(e.queue_limit, batch);
  // Of what the sequences need and a block each, not of free memory: other programs run here too.
  // Concatenation needs the new run beside the old one, and room between runs.
  const int64_t runs = e.kv_layout == KvLayout::concat ? 3 : 1;
  if (e.kv_tokens == 0) e.kv_tokens = runs * (wanted + 2 * e.block_size) * batch;
  e.prefix_cache = false;
  return e;
}

using RowOf = std::function<ordered_json(Engine& engine, const EngineOptions& e, int64_t batch, int64_t length)>;

// The numbers of threads to go through; behind them the team is as large as before.
struct TeamSizes {
  explicit TeamSizes(const std::vector<int>& wanted) : before(num_threads()) {
    for (const int n : wanted) {
      set_num_threads(n);
      list.push_back(num_threads());
    }
    if (list.empty()) list.push_back(before);
  }
  ~TeamSizes() { set_num_threads(before); }
  TeamSizes(const TeamSizes&) = delete;
  int largest() const { return *std::max_element(list.begin(), list.end()); }

  const int before;
  std::vector<int> list;
};

// What memory gives at most (0: still to be measured), and how much of it the row uses.
void add_limit(ordered_json& row, double bandwidth) {
  if (row["step_bytes"].is_null()) {
    for (const char* key : {"gbytes_per_second", "limit_gbytes_per_second", "share_of_limit"}) row[key] = nullptr;
    return;
  }
  const auto bytes = row["step_bytes"].get<double>(), steps = 1e3 / row["step_ms"].get<double>();
  if (bandwidth == 0) {
    bandwidth = measure_read_bandwidth(static_cast<int64_t>(bytes));
    release_team();  // the engine's thread computes
  }
  row["gbytes_per_second"] = bytes * steps / 1e9;
  row["limit_gbytes_per_second"] = bandwidth / 1e9;
  row["share_of_limit"] = bytes * steps / bandwidth;
}

ordered_json bench_rows(const char* name, const Model& model, const InferBenchOptions& o, int64_t n_new,
                        const RowOf& row_of, const std::function<void(const ordered_json&)>& on_row) {
  EngineOptions e = fitting(o, model.config, n_new);
  const Device& dev = e.device;
  const TeamSizes sizes(o.threads);
  set_num_threads(sizes.largest());
  const double bandwidth = measure_bandwidth(dev);
  ordered_json result{{"bench", name},
                      {"parameters", param_count(model.config)},
                      {"threads", num_threads()},
                      {"processor", dev.on_gpu() ? cuda_status().name : cpu_features().model_name},
                      {"isa", isa_name(selected_isa())},
                      {"bandwidth", bandwidth},
                      {"rounds", o.rounds},
                      {"kv_layout", kv_layout_name(e.kv_layout)},
                      {"rows", ordered_json::array()}};
  const auto one_engine = [&](WeightFormat weights, KvFormat kv) {
    e.weights = weights;
    e.kv = kv;
    Engine engine(model, std::nullopt, e, o.draft);  // lays out memory for the threads of now
    if (result["rows"].empty()) result["engine"] = engine.description();
    else if (result["engine"] != engine.description()) result["engine"] = nullptr;
    for (const int64_t batch : o.batch) {
      for (const int64_t length : o.length) {
        ordered_json row{{"weights", weight_format_name(weights)},
                         {"kv", kv_format_name(kv)},
                         {"threads", num_threads()},
                         {"batch", batch}};
        row.update(row_of(engine, e, batch, length));
        if (row.contains("step_bytes")) add_limit(row, dev.on_gpu() ? bandwidth : 0);
        result["rows"].push_back(row);
        on_row(row);
      }
    }
  };
  for (const int threads : sizes.list) {
    set_num_threads(threads);
    for (const WeightFormat weights : o.weights)
      for (const KvFormat kv : o.kv) one_engine(weights, kv);
  }
  return result;
}

}  // namespace

double decode_step_bytes(const ModelConfig& config, WeightFormat weights, KvFormat kv, int64_t batch, double depth) {
  double n = static_cast<double>(active_param_count(config));
  if (!config.tie_word_embeddings) n -= static_cast<double>(config.vocab_size * config.hidden_size);  // looked up
  if (config.num_experts > 0) {
    const int64_t k = config.num_experts_per_tok, idle = config.num_experts - k;
    const int64_t more = std::min(config.num_experts, batch * k) - k;
    if (idle > 0)
      n += static_cast<double>(param_count(config) - active_param_count(config)) * static_cast<double>(more) /
           static_cast<double>(idle);
  }
  const double bytes = weights == WeightFormat::f32  ? 4
                       : weights == WeightFormat::i8 ? 1 + 2.0 / static_cast<double>(weight_group)
                                                     : 2;
  return n * bytes + static_cast<double>(batch) * depth * static_cast<double>(kv_bytes_per_token(config, kv));
}

ordered_json bench_decode(const Model& model, const InferBenchOptions& o,
                          const std::function<void(const ordered_json&)>& on_row) {
  // Sequences begin one after another while earlier ones already decode: tokens for that, beside those timed.
  const int64_t batch = *std::max_element(o.batch.begin(), o.batch.end());
  const int64_t depth = *std::max_element(o.length.begin(), o.length.end());
  const int64_t step = o.engine.step_tokens > 0 ? o.engine.step_tokens : o.engine.device.on_gpu() ? 4096 : 512;
  const auto new_tokens = [&](int64_t b, int64_t d) { return o.n_tok + 2 + 2 * (b * d / step + 1) * (b > 1 ? 1 : 0); };
  const auto row_of = [&](Engine& engine, const EngineOptions& e, int64_t b, int64_t d) {
    std::vector<double> speeds;
    Trace trace;
    for (int64_t round = -1, failed = 0; round < o.rounds; round++) {
      run_round(engine, model.config.vocab_size, b, std::max<int64_t>(d, 1), new_tokens(b, d), o.sampled,
                static_cast<uint64_t>(round + 2), trace);
      const double speed = decode_speed(trace);
      if (speed > 0) {
        if (round >= 0) speeds.push_back(speed);
      } else if (++failed > 20) {
        throw Error("bench decode", "sequences that decode at the same time", "none in 20 rounds",
                    "raise --tokens, or use a less busy machine");
      } else {
        round--;
      }
    }
    const Spread s = spread_of(speeds);
    ordered_json row{{"depth", d},
                     {"tokens_per_second", s.median},
                     {"lowest", s.lowest},
                     {"highest", s.highest},
                     {"step_ms", 1e3 * static_cast<double>(b) / s.median},
                     {"step_bytes", nullptr}};
    const double length = static_cast<double>(d) + static_cast<double>(o.n_tok) / 2;
    if (e.ngram_draft == 0 && e.draft_tokens == 0)
      row["step_bytes"] = decode_step_bytes(model.config, e.weights, e.kv, b, length);
    return row;
  };
  return bench_rows("decode", model, o, new_tokens(batch, depth), row_of, on_row);
}

ordered_json bench_prefill(const Model& model, const InferBenchOptions& o,
                           const std::function<void(const ordered_json&)>& on_row) {
  const auto row_of = [&](Engine& engine, const EngineOptions&, int64_t b, int64_t n) {
    std::vector<double> seconds;
    Trace trace;
    for (int64_t round = -1; round < o.rounds; round++) {
      run_round(engine, model.config.vocab_size, b, n, 1, o.sampled, static_cast<uint64_t>(round + 2), trace);
      double last = 0;
      for (const auto& t : trace.times) last = std::max(last, t.front());
      if (round >= 0) seconds.push_back(last);
    }
    const Spread s = spread_of(seconds);
    const auto tokens = static_cast<double>(b * n);
    return ordered_json{
        {"length", n},
        {"tokens_per_second", tokens / s.median},
        {"lowest", tokens / s.highest},
        {"highest", tokens / s.lowest},
        {"ttft_ms", 1e3 * s.median},
        {"gflops", tokens / s.median * forward_flops_per_token(model.config, static_cast<double>(n) / 2) / 1e9}};
  };
  return bench_rows("prefill", model, o, 1, row_of, on_row);
}

}  // namespace mm
