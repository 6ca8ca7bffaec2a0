#include "lab/soak.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <thread>

#include "base/error.h"
#include "base/interrupt.h"
#include "base/progress.h"
#include "base/rng.h"
#include "lab/load_plan.h"

namespace mm {

namespace {

enum Kind : int { kChat, kCompletion, kWhole, kBadJson, kHuge, kSlow, kDropped, kCancelled, kKinds };
constexpr const char* kKindNames[kKinds] = {"chat stream", "completion stream", "whole answer",   "bad JSON",
                                            "1 MB prompt", "slow reader",       "dropped socket", "cancelled stream"};
bool well_meant(int kind) { return kind <= kWhole; }
bool in_full(int kind) { return well_meant(kind) || kind == kSlow; }

const std::vector<std::string>& bad_bodies() {
  static const std::vector<std::string> all{
      "",
      "null",
      std::string(200, '['),
      R"({"messages": [{"role": "user", "content": "cut)",
      R"({"messages": 5})",
      "{\"messages\": [{\"role\": \"user\", \"content\": \"\xff\xfe\"}]}",
      R"({"messages": [{"role": "user", "content": "a"}], "max_tokens": -4})",
      R"({"messages": [{"role": "user", "content": "a"}], "temperature": "hot"})",
  };
  return all;
}

class Traffic {
 public:
  explicit Traffic(const SoakOptions& o) : options_(o) {
    plan_.model = "";
    plan_.prompt_tokens = {LengthDistribution::Kind::lognormal, 64, 1.0};
    plan_.output_tokens = {LengthDistribution::Kind::lognormal, 64, 0.6};
    plan_.max_tokens = o.max_tokens;
    plan_.seed = o.seed;
    plan_.extra = {{"top_k", 50}};
    huge_ = ordered_json{{"messages", {{{"role", "user"}, {"content", synthetic_prompt(1, 1, 200000, 0)}}}}}.dump();
  }

  OutRequest make(uint64_t i, bool hostile_too) const {
    Rng rng{options_.seed, 77, 4 * i};
    const double dice = rng.uniform();
    int kind = dice < 0.6 ? kChat : dice < 0.8 ? kCompletion : kWhole;
    if (hostile_too && rng.uniform() < options_.hostile)
      kind = kBadJson + static_cast<int>(rng.below(kKinds - kBadJson));
    LoadPlan plan = plan_;
    plan.chat = kind != kCompletion;
    plan.stream = kind != kWhole;
    ordered_json body = plan.request(i);
    body.erase("model");  // whatever the server has
    OutRequest r{.path = plan.chat ? "/v1/chat/completions" : "/v1/completions", .stream = plan.stream, .kind = kind};
    r.max_tokens = body["max_tokens"].get<int64_t>();
    r.body = kind == kHuge ? huge_ : kind == kBadJson ? bad_bodies()[rng.below(bad_bodies().size())] : body.dump();
    if (kind == kSlow) r.behaviour = Behaviour::slow_reader;
    if (kind == kDropped) r.behaviour = Behaviour::dropped;
    if (kind == kCancelled) r.behaviour = Behaviour::cancelled, r.cancel_after = 1 + static_cast<int64_t>(i % 8);
    return r;
  }

 private:
  const SoakOptions& options_;
  LoadPlan plan_;
  std::string huge_;
};

std::map<std::string, double> server_metrics(const LoadTarget& target) {
  const HttpAnswer answer = http_get(target, "/metrics", 10);
  if (answer.status != 200)
    throw Error(target.name() + "/metrics", "status 200", fmt::format("{}", answer.status), "pass --api-key?");
  return parse_metrics(answer.body);
}

// Resident memory in MB; NaN when the process is gone.
double resident_mb(int64_t pid) {
  std::ifstream in(fmt::format("/proc/{}/status", pid));
  for (std::string line; std::getline(in, line);) {
    if (line.starts_with("VmRSS:")) return std::strtod(line.c_str() + 6, nullptr) / 1024;
  }
  return NAN;
}

struct Samples {
  std::vector<double> seconds, rss, waiting, running, kv_usage;
  int64_t n_missed = 0;  // times /metrics did not answer
};

// Once a second until told to end, on a thread of its own: the server may be slow to answer.
void watch_server(const SoakOptions& o, const std::atomic<bool>& stop, Samples& samples) {
  const double start = now_seconds();
  while (!stop) {
    try {
      const auto m = server_metrics(o.target);
      const auto value = [&](const char* name) {
        const auto it = m.find(name);
        return it != m.end() ? it->second : NAN;
      };
      samples.seconds.push_back(now_seconds() - start);
      samples.rss.push_back(o.pid > 0 ? resident_mb(o.pid) : NAN);
      samples.waiting.push_back(value("minimind_requests_waiting"));
      samples.running.push_back(value("minimind_requests_running"));
      samples.kv_usage.push_back(value("minimind_kv_usage_ratio"));
    } catch (const Error&) {
      samples.n_missed++;
    }
    for (int i = 0; i < 20 && !stop; i++) std::this_thread::sleep_for(std::chrono::milliseconds(50));
  }
}

double measure_capacity(const SoakOptions& o, const Traffic& traffic) {
  Progress bar("capacity", 10, "s");
  const double start = now_seconds();
  const LoadResult r =
      run_load(o.target,
               {.clients = o.clients,
                .seconds = 10,
                .warmup = o.clients,
                .make = [&](uint64_t i) { return traffic.make(i + (uint64_t{1} << 40), false); }},
               [&](const LoadCounts& c) {
                 bar.set(static_cast<int64_t>(now_seconds() - start), fmt::format("{} done", c.done.load()));
                 return !InterruptGuard::requested();
               });
  int64_t ok = 0;
  double first = INFINITY, last = 0;
  for (const RequestRecord& q : r.requests) {
    if (q.failure != Failure::none) continue;
    ok++;
    first = std::min(first, q.due);
    last = std::max(last, q.end);
  }
  if (ok == 0) throw Error(o.target.name(), "answers", "none in 10 s", "look at the server's log");
  return static_cast<double>(ok) / (last - first);
}

std::string outcome(const RequestRecord& r) {
  if (r.failure == Failure::none) return "answered";
  if (r.failure == Failure::http) return fmt::format("http_{}", r.status);
  return failure_name(r.failure);
}

struct Verdict {
  ordered_json checks = ordered_json::array();
  bool passed = true;
  void add(const std::string& name, bool ok, const std::string& found) {
    checks.push_back({{"check", name}, {"passed", ok}, {"found", found}});
    passed = passed && ok;
  }
};

void check_answers(const std::vector<RequestRecord>& requests, Verdict& verdict) {
  int64_t accepted = 0, short_ones = 0, broken = 0, refused = 0, other = 0, bad = 0, bad_right = 0;
  for (const RequestRecord& r : requests) {
    if (r.kind == kBadJson || r.kind == kHuge) {
      bad++;
      // Refused for what it is, or before it was read because the queue was full.
      bad_right += r.status == 400 || r.status == 413 || r.status == 422 || r.status == 429 || r.status == 503;
    }
    if (!in_full(r.kind)) continue;
    if (r.status == 200) {
      accepted++;
      if (r.failure != Failure::none) broken += well_meant(r.kind);  // a slow reader may be let go
      else short_ones += r.usage != r.max_tokens || (r.kind != kWhole && !r.done_mark);
    } else if (r.status == 429 || r.status == 503) {
      refused++;
    } else {
      other++;
    }
  }
  verdict.add("every accepted request answered in full", accepted > 0 && broken == 0 && short_ones == 0,
              fmt::format("{} accepted, {} broken off, {} shorter than asked", accepted, broken, short_ones));
  verdict.add("the rest refused with 429 or 503", other == 0,
              fmt::format("{} refused, {} something else", refused, other));
  verdict.add("bad requests refused", bad_right == bad, fmt::format("{} of {}", bad_right, bad));
}

void check_memory(const SoakOptions& o, const Samples& samples, Verdict& verdict, ordered_json& result) {
  if (o.pid <= 0) return;
  const double warm = o.warm_seconds > 0 ? o.warm_seconds : o.seconds / 4;
  std::vector<std::pair<double, double>> points;
  for (size_t i = 0; i < samples.rss.size(); i++) {
    if (samples.seconds[i] >= warm && std::isfinite(samples.rss[i]))
      points.emplace_back(samples.seconds[i], samples.rss[i]);
  }
  const double mb_a_second = slope(points), span = points.empty() ? 0 : points.back().first - points.front().first;
  const double first = points.empty() ? NAN : points.front().second;
  result["rss_mb_per_hour"] = 3600 * mb_a_second;
  // Allocators keep what bursts needed: a few MB over the whole run are no leak, one a minute is.
  verdict.add("memory flat", points.size() > 1 && mb_a_second * span < std::max(8.0, 0.02 * first),
              fmt::format("{:.1f} MB to {:.1f} MB, {:+.2f} MB an hour", first,
                          points.empty() ? NAN : points.back().second, 3600 * mb_a_second));
}

void check_metrics(const SoakOptions& o, const std::map<std::string, double>& before,
                   const std::vector<RequestRecord>& requests, Verdict& verdict, ordered_json& result) {
  std::map<std::string, double> after;
  for (int i = 0; i < 600; i++) {  // what is still in the queue ends first
    after = server_metrics(o.target);
    if (after["minimind_requests_waiting"] == 0 && after["minimind_requests_running"] == 0) break;
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
  }
  const auto grown = [&](const std::string& name) {
    return (after.contains(name) ? after.at(name) : NAN) - (before.contains(name) ? before.at(name) : 0);
  };
  const auto total = [&](const char* what) { return grown(fmt::format("minimind_requests_{}_total", what)); };
  ordered_json counters;
  for (const auto& [name, value] : after) {
    if (name.find("_total") != std::string::npos) counters[name] = grown(name);
  }
  result["metrics"] = counters;
  verdict.add("no restart", after["minimind_uptime_seconds"] >= before.at("minimind_uptime_seconds") + 0.9 * o.seconds,
              fmt::format("up for {:.0f} s", after["minimind_uptime_seconds"]));
  const double ended = total("finished") + total("cancelled") + total("timed_out") + total("failed");
  verdict.add("submitted = finished + cancelled + timed out + failed", total("submitted") == ended,
              fmt::format("{:.0f} = {:.0f} + {:.0f} + {:.0f} + {:.0f}", total("submitted"), total("finished"),
                          total("cancelled"), total("timed_out"), total("failed")));
  verdict.add("no request failed inside the engine", total("failed") == 0, fmt::format("{:.0f}", total("failed")));
  double accepted = 0, answered = 0, tokens = 0, refused = 0;
  for (const RequestRecord& r : requests) {
    accepted += r.status == 200;
    refused += r.status == 429;
    answered += r.status == 200 && r.failure == Failure::none;
    if (r.failure == Failure::none && r.usage > 0) tokens += static_cast<double>(r.usage);
  }
  verdict.add("submitted = accepted as the clients saw it", total("submitted") == accepted,
              fmt::format("{:.0f} and {:.0f}", total("submitted"), accepted));
  verdict.add("rejected = 429 as the clients saw it", total("rejected") == refused,
              fmt::format("{:.0f} and {:.0f}", total("rejected"), refused));
  verdict.add("finished >= answered as the clients saw it", total("finished") >= answered,
              fmt::format("{:.0f} and {:.0f}", total("finished"), answered));
  verdict.add("tokens generated >= tokens received", grown("minimind_generated_tokens_total") >= tokens,
              fmt::format("{:.0f} and {:.0f}", grown("minimind_generated_tokens_total"), tokens));
  verdict.add("no block of the KV pool still in use", after["minimind_kv_blocks_used"] == 0,
              fmt::format("{:.0f}", after["minimind_kv_blocks_used"]));
}

}  // namespace

std::map<std::string, double> parse_metrics(const std::string& text) {
  std::map<std::string, double> values;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    const std::string line = text.substr(begin, end - begin);
    const size_t space = line.rfind(' ');
    if (!line.empty() && line[0] != '#' && space != std::string::npos) {
      char* stop = nullptr;
      const double v = std::strtod(line.c_str() + space + 1, &stop);
      if (stop != line.c_str() + space + 1) values[line.substr(0, space)] = v;
    }
    begin = end + 1;
  }
  return values;
}

double slope(const std::vector<std::pair<double, double>>& points) {
  double x = 0, y = 0, xx = 0, xy = 0;
  const auto n = static_cast<double>(points.size());
  for (const auto& [a, b] : points) x += a / n, y += b / n;
  for (const auto& [a, b] : points) xx += (a - x) * (a - x), xy += (a - x) * (b - y);
  return xx > 0 ? xy / xx : 0;
}

ordered_json run_soak(const SoakOptions& o) {
  const InterruptGuard guard;
  auto before = server_metrics(o.target);
  if (!before.contains("minimind_requests_submitted_total"))
    throw Error(o.target.name() + "/metrics", "the counters of minimind serve", "others");
  if (o.pid > 0 && std::isnan(resident_mb(o.pid)))
    throw Error("--pid", "the process of the server", fmt::format("{}", o.pid));
  const Traffic traffic(o);
  ordered_json result{{"bench", "soak"}, {"url", "http://" + o.target.name()}};
  const double capacity = o.capacity > 0 ? o.capacity : measure_capacity(o, traffic), rate = o.overload * capacity;
  before = server_metrics(o.target);
  result.update({{"capacity", capacity}, {"rate", rate}, {"hostile", o.hostile}});

  Samples samples;
  std::atomic<bool> stop{false};
  std::jthread watcher([&] { watch_server(o, stop, samples); });
  LoadResult load;
  {
    Progress bar("soak", static_cast<int64_t>(o.seconds), "s");
    const double start = now_seconds();
    load = run_load(o.target,
                    {.rate = rate,
                     .seconds = o.seconds,
                     .timeout = 300,
                     .max_connections = 1000,
                     .seed = o.seed,
                     .make = [&](uint64_t i) { return traffic.make(i, true); }},
                    [&](const LoadCounts& c) {
                      bar.rate_units(c.events, "events");
                      bar.set(static_cast<int64_t>(now_seconds() - start),
                              fmt::format("{} running, {} answered, {} refused or failed", c.active.load(),
                                          c.done.load(), c.failed.load()));
                      return !InterruptGuard::requested();
                    });
  }
  stop = true;
  watcher.join();

  Verdict verdict;
  result["seconds"] = load.window_seconds;
  std::map<std::string, std::map<std::string, int64_t>> kinds;
  LoadResult well;
  well.window_seconds = load.window_seconds;
  well.window_tokens = load.window_tokens;
  for (const RequestRecord& r : load.requests) {
    kinds[kKindNames[r.kind]][outcome(r)]++;
    if (well_meant(r.kind)) well.requests.push_back(r);
  }
  result["kinds"] = kinds;
  result["latency"] = summarize_load(well, {});
  if (load.interrupted) verdict.add("ran to its end", false, "interrupted");
  bool alive = false;
  try {
    alive = http_get(o.target, "/health", 10).status == 200;
    if (alive && !load.interrupted) check_metrics(o, before, load.requests, verdict, result);
  } catch (const Error&) {
    alive = false;
  }
  verdict.add("server alive", alive && (o.pid <= 0 || std::isfinite(resident_mb(o.pid))),
              alive ? "answers /health" : "no answer");
  check_answers(load.requests, verdict);
  check_memory(o, samples, verdict, result);
  verdict.add("/metrics always answered", samples.n_missed == 0, fmt::format("{} misses", samples.n_missed));
  ordered_json series{{"seconds", samples.seconds}};
  if (o.pid > 0) series["rss_mb"] = samples.rss;
  series.update({{"waiting", samples.waiting}, {"running", samples.running}, {"kv_usage", samples.kv_usage}});
  result["samples"] = std::move(series);
  result["checks"] = verdict.checks;
  result["passed"] = verdict.passed;
  return result;
}

}  // namespace mm
