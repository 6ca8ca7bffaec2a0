#include "lab/bench_serve.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <thread>

#include "base/error.h"
#include "base/interrupt.h"
#include "base/progress.h"

namespace mm {

namespace {

std::string first_model(const LoadTarget& target) {
  const HttpAnswer answer = http_get(target, "/v1/models", 10);
  if (answer.status == 401 || answer.status == 403)
    throw Error(target.name(), "leave to list the models", fmt::format("status {}", answer.status), "pass --api-key");
  try {
    return parse_json(answer.body, "/v1/models").at("data").at(0).at("id").get<std::string>();
  } catch (const std::exception&) {
    return "default";  // a server without the list takes any name
  }
}

std::vector<double> ttft_quantiles_ms(const LoadResult& result) {
  std::vector<double> ttft, quantiles;
  for (const RequestRecord& r : result.requests) {
    if (r.failure == Failure::none && r.first > 0) ttft.push_back(1e3 * r.ttft());
  }
  if (ttft.empty()) return {};
  std::sort(ttft.begin(), ttft.end());
  for (int p = 0; p <= 48; p++) quantiles.push_back(percentile(ttft, 100.0 * p / 48));
  return quantiles;
}

ordered_json run_level(const ServeBenchOptions& o, const std::string& model, int64_t clients, double rate,
                       uint64_t first_request) {
  LoadPlan plan = o.plan;
  plan.model = model;
  LoadLevel level{
      .clients = clients,
      .rate = rate,
      .n_request = o.n_request,
      .seconds = o.seconds,
      .warmup = o.warmup >= 0 ? o.warmup
                : clients > 0 ? clients
                              : static_cast<int64_t>(std::ceil(rate)),
      .timeout = o.timeout,
      .keep_alive = o.keep_alive,
      .workers = o.workers > 0 ? o.workers : std::max(1, static_cast<int>(std::thread::hardware_concurrency()) / 8),
      .seed = plan.seed,
      .make = [&plan, first_request](uint64_t i) {
        OutRequest r{.path = plan.chat ? "/v1/chat/completions" : "/v1/completions", .stream = plan.stream};
        const ordered_json body = plan.request(first_request + i);
        r.max_tokens = body["max_tokens"].get<int64_t>();
        r.body = body.dump(-1, ' ', false, json::error_handler_t::replace);
        return r;
      }};
  if (clients > 0) level.workers = std::min<int>(level.workers, static_cast<int>(clients));
  const std::string name = clients > 0 ? fmt::format("{} clients", clients) : fmt::format("{:g} requests/s", rate);
  const bool by_count = o.n_request > 0;
  Progress bar(name, by_count ? o.n_request + level.warmup : static_cast<int64_t>(std::ceil(o.seconds)),
               by_count ? "requests" : "s");
  const double start = now_seconds();
  const LoadResult result = run_load(o.target, level, [&](const LoadCounts& c) {
    bar.rate_units(c.events, "events");
    bar.set(by_count ? c.done + c.failed : static_cast<int64_t>(now_seconds() - start),
            fmt::format("{} running, {} done, {} failed", c.active.load(), c.done.load(), c.failed.load()));
    return !InterruptGuard::requested();
  });
  ordered_json j = clients > 0 ? ordered_json{{"clients", clients}} : ordered_json{{"rate", rate}};
  j.update(summarize_load(result, o.slo));
  j["ttft_cdf_ms"] = ttft_quantiles_ms(result);
  return j;
}

std::string distribution_text(const LengthDistribution& d) {
  using Kind = LengthDistribution::Kind;
  switch (d.kind) {
    case Kind::fixed: return fmt::format("{:g}", d.a);
    case Kind::uniform: return fmt::format("uniform:{:g}:{:g}", d.a, d.b);
    case Kind::normal: return fmt::format("normal:{:g}:{:g}", d.a, d.b);
    case Kind::lognormal: return fmt::format("lognormal:{:g}:{:g}", d.a, d.b);
  }
  return "?";
}

}  // namespace

ordered_json bench_serve(const ServeBenchOptions& o, const std::function<void(const ordered_json&)>& on_level) {
  const std::string model = o.plan.model.empty() ? first_model(o.target) : o.plan.model;
  ordered_json result{
      {"bench", "serve"},
      {"url", "http://" + o.target.name()},
      {"model", model},
      {"endpoint", o.plan.chat ? "chat" : "completions"},
      {"stream", o.plan.stream},
      {"ignore_eos", o.plan.ignore_eos},
      {"temperature", o.plan.temperature},
      {"prompts", o.plan.prompts.empty()
                      ? "synthetic, " + distribution_text(o.plan.prompt_tokens) + " tokens" +
                            (o.plan.shared_tokens > 0 ? fmt::format(", {} shared", o.plan.shared_tokens) : "")
                      : fmt::format("{} rows", o.plan.prompts.size())},
      {"output_tokens", distribution_text(o.plan.output_tokens)},
      {"seed", o.plan.seed},
      {"levels", ordered_json::array()}};
  if (o.plan.extra.is_object() && !o.plan.extra.empty()) result["extra"] = o.plan.extra;
  const InterruptGuard guard;
  uint64_t first_request = 0;  // no level asks again what an earlier one asked: a prefix cache would answer
  const auto level = [&](int64_t clients, double rate) {
    if (InterruptGuard::requested()) return;
    result["levels"].push_back(run_level(o, model, clients, rate, first_request));
    first_request += 1u << 24;
    on_level(result["levels"].back());
  };
  for (const int64_t clients : o.clients) level(clients, 0);
  for (const double rate : o.rates) level(0, rate);
  return result;
}

}  // namespace mm
