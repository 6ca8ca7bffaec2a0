// A long run against `minimind serve` at more than it can take, a share of it hostile, and the verdict on what it did.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "base/json.h"
#include "lab/load_client.h"

namespace mm {

struct SoakOptions {
  LoadTarget target;
  double seconds = 1800;
  double capacity = 0;  // requests a second that the server manages; 0: measured first, by a closed loop of `clients`
  int64_t clients = 32;
  double overload = 2;       // times the capacity is offered
  double hostile = 0.1;      // share of: bad JSON, prompts of 1 MB, slow readers, dropped sockets, cancelled streams
  int64_t max_tokens = 400;  // of a prompt (in words) and of an answer; the median of both is 64
  int64_t pid = 0;           // the server's, to watch its memory; 0: not watched
  double warm_seconds = 0;   // of the run, before its memory must be flat (the KV pool fills); 0: a quarter of it
  uint64_t seed = 0;
};

// Name (with labels) -> value of a Prometheus text. Lines that are none are left out.
std::map<std::string, double> parse_metrics(const std::string& text);

// Least squares: growth a unit of x. 0 for fewer than two points.
double slope(const std::vector<std::pair<double, double>>& points);

// {"passed", "checks": [{"check", "passed", "found"}], "capacity", "rate", "seconds", "kinds": {kind: {outcome: n}},
// "latency": see summarize_load (of well-meant requests), "metrics": growth of the server's counters, "samples":
// {"seconds", "rss_mb", "waiting", "running", "kv_usage"}}. Error when there is no such server to begin with.
ordered_json run_soak(const SoakOptions& options);

}  // namespace mm
