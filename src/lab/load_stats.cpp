#include "lab/load_stats.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"

namespace mm {

const char* failure_name(Failure failure) {
  switch (failure) {
    case Failure::none: return "none";
    case Failure::connect: return "connect";
    case Failure::http: return "http";
    case Failure::timeout: return "timeout";
    case Failure::cut: return "cut";
    case Failure::malformed: return "malformed";
    case Failure::stream_error: return "stream_error";
    case Failure::abandoned: return "abandoned";
  }
  return "?";
}

double RequestRecord::tpot() const {
  const int64_t n = output_tokens();
  return n > 1 && n_event > 1 ? (last - first) / static_cast<double>(n - 1) : NAN;
}

double percentile(const std::vector<double>& sorted, double p) {
  if (sorted.empty()) return NAN;
  const double at = p / 100 * static_cast<double>(sorted.size() - 1);
  const auto low = static_cast<size_t>(at);
  if (low + 1 >= sorted.size()) return sorted.back();
  return sorted[low] + (at - static_cast<double>(low)) * (sorted[low + 1] - sorted[low]);
}

Summary summarize(std::vector<double> values) {
  std::erase_if(values, [](double v) { return !std::isfinite(v); });
  if (values.empty()) return {};
  std::sort(values.begin(), values.end());
  double sum = 0;
  for (const double v : values) sum += v;
  return {.n = static_cast<int64_t>(values.size()),
          .mean = sum / static_cast<double>(values.size()),
          .p50 = percentile(values, 50),
          .p90 = percentile(values, 90),
          .p99 = percentile(values, 99),
          .max = values.back()};
}

bool Slo::any() const { return std::isfinite(ttft) || std::isfinite(tpot) || std::isfinite(e2e); }

bool Slo::met_by(const RequestRecord& r) const {
  // A limit on what a request does not have (a second token) is kept.
  return r.failure == Failure::none && !(r.ttft() > ttft) && !(r.tpot() > tpot) && !(r.e2e() > e2e);
}

Slo slo_from_text(const std::string& text) {
  Slo slo;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    const std::string part = text.substr(begin, end - begin);
    const size_t colon = std::min(part.find(':'), part.size());
    const std::string name = part.substr(0, colon);
    double* field = name == "ttft" ? &slo.ttft : name == "tpot" ? &slo.tpot : name == "e2e" ? &slo.e2e : nullptr;
    size_t used = 0;
    double ms = NAN;
    try {
      ms = std::stod(part.substr(std::min(colon + 1, part.size())), &used);
    } catch (const std::exception&) {
    }
    if (field == nullptr || !(ms > 0) || colon + 1 + used != part.size())
      throw Error("--slo", "ttft:MS,tpot:MS,e2e:MS (any of them)", fmt::format("\"{}\"", part));
    *field = ms / 1e3;
    begin = end + 1;
  }
  return slo;
}

static ordered_json summary_json(const std::vector<double>& seconds) {
  const Summary s = summarize(seconds);
  const auto ms = [](double v) { return std::isfinite(v) ? ordered_json(std::round(v * 1e6) / 1e3) : ordered_json(); };
  return {{"mean", ms(s.mean)}, {"p50", ms(s.p50)}, {"p90", ms(s.p90)}, {"p99", ms(s.p99)}, {"max", ms(s.max)}};
}

ordered_json summarize_load(const LoadResult& result, const Slo& slo) {
  std::vector<double> ttft, tpot, e2e, late;
  std::map<std::string, int64_t> errors;
  int64_t ok = 0, failed = 0, good = 0, by_length = 0, counted = 0;
  double output = 0, prompt = 0, cached = 0, ok_prompt_known = 0;
  for (const RequestRecord& r : result.requests) {
    if (r.failure == Failure::abandoned) continue;
    if (r.sent > 0) late.push_back(r.sent - r.due);
    if (r.failure != Failure::none) {
      failed++;
      errors[r.failure == Failure::http ? fmt::format("http_{}", r.status) : failure_name(r.failure)]++;
      continue;
    }
    ok++;
    by_length += r.by_length;
    good += slo.met_by(r);
    counted += r.usage >= 0;
    output += static_cast<double>(r.output_tokens());
    if (r.prompt_tokens >= 0) prompt += static_cast<double>(r.prompt_tokens), ok_prompt_known++;
    if (r.cached_tokens > 0) cached += static_cast<double>(r.cached_tokens);
    if (r.first > 0) ttft.push_back(r.ttft());
    tpot.push_back(r.tpot());
    e2e.push_back(r.e2e());
  }
  const double seconds = std::max(result.window_seconds, 1e-9), n = static_cast<double>(std::max<int64_t>(ok, 1));
  const double output_rate = result.window_tokens / seconds;
  const auto mean = [](double sum, double count) { return count > 0 ? ordered_json(sum / count) : ordered_json(); };
  ordered_json j{{"requests", ok + failed},
                 {"ok", ok},
                 {"failed", failed},
                 {"errors", errors},
                 {"seconds", result.window_seconds},
                 {"requests_per_second", static_cast<double>(ok) / seconds},
                 {"output_tokens_per_second", output_rate},
                 {"total_tokens_per_second", output_rate + prompt / seconds},
                 {"prompt_tokens_mean", mean(prompt, ok_prompt_known)},
                 {"cached_tokens_mean", mean(cached, ok_prompt_known)},
                 {"output_tokens_mean", output / n},
                 {"finished_by_length", by_length},
                 {"tokens_from", counted == ok  ? "usage"
                                 : counted == 0 ? "events"
                                                : "usage, where the server gave it"},
                 {"ttft_ms", summary_json(ttft)},
                 {"tpot_ms", summary_json(tpot)},
                 {"itl_ms", summary_json({result.gaps.begin(), result.gaps.end()})},
                 {"e2e_ms", summary_json(e2e)},
                 {"late_ms", summary_json(late)},
                 {"client_busiest_worker", result.busiest_worker},
                 {"client_cpu_seconds", result.cpu_seconds},
                 {"reconnects", result.n_reconnect}};
  if (slo.any()) {
    j["goodput"] = {{"requests_per_second", static_cast<double>(good) / seconds},
                    {"share", ok + failed > 0 ? static_cast<double>(good) / static_cast<double>(ok + failed) : 0.0}};
  }
  if (result.interrupted) j["interrupted"] = true;
  return j;
}

}  // namespace mm
