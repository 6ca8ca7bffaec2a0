// The arithmetic of a load test: single requests become percentiles, throughput and goodput.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "base/json.h"

namespace mm {

enum class Failure {
  none,
  connect,       // no connection
  http,          // a status other than 200
  timeout,       // no end within the time allowed
  cut,           // the connection ended before the answer did
  malformed,     // not HTTP, not JSON, or a stream without its end mark
  stream_error,  // the server said so inside a stream
  abandoned,     // by ourselves (cancelled on purpose, or the run was interrupted): neither success nor failure
};
const char* failure_name(Failure failure);

// One request. Times are seconds on the clock of now_seconds().
struct RequestRecord {
  double due = 0;              // when it was meant to be sent: what latencies count from
  double sent = 0;             // when it was
  double first = 0, last = 0;  // first and last event with text; 0: none
  double end = 0;
  int64_t n_event = 0;                                         // events with text
  int64_t prompt_tokens = -1, cached_tokens = -1, usage = -1;  // as the server counts; -1: it did not say
  int status = 0;
  Failure failure = Failure::none;
  bool by_length = false;  // finish_reason "length"
  bool done_mark = false;  // "data: [DONE]" came
  int kind = 0;            // the caller's, see OutRequest
  int64_t max_tokens = 0;
  bool measured = false;  // not of the warm-up
  int64_t output_tokens() const { return usage >= 0 ? usage : n_event; }
  double ttft() const { return first - due; }
  double e2e() const { return end - due; }
  // Mean time a token after the first; NaN with fewer than two.
  double tpot() const;
};

// Linear interpolation between the closest ranks, as numpy does by default. NaN for no values. p in [0, 100].
double percentile(const std::vector<double>& sorted, double p);

struct Summary {
  int64_t n = 0;
  double mean = NAN, p50 = NAN, p90 = NAN, p99 = NAN, max = NAN;
};
Summary summarize(std::vector<double> values);  // values that are not finite are left out

// Limits that a good request keeps, in seconds.
struct Slo {
  double ttft = std::numeric_limits<double>::infinity(), tpot = ttft, e2e = ttft;
  bool any() const;
  bool met_by(const RequestRecord& r) const;
};
Slo slo_from_text(const std::string& text);  // "ttft:500,tpot:50,e2e:3000", milliseconds; Error on anything else

// What a load level measured.
struct LoadResult {
  std::vector<RequestRecord> requests;  // the measured ones
  std::vector<float> gaps;              // seconds between events of a stream
  double window_seconds = 0;
  double window_tokens = 0;   // output tokens that arrived inside the window, of whatever request
  double busiest_worker = 0;  // share of a core
  double cpu_seconds = 0;     // of all workers
  int64_t n_reconnect = 0;    // kept connections that the server had closed
  bool interrupted = false;
};

// {"requests", "ok", "failed", "errors": {kind: n}, "seconds", "requests_per_second", "output_tokens_per_second",
//  "total_tokens_per_second", "prompt_tokens_mean", "output_tokens_mean", "tokens_from": "usage"|"events",
//  "ttft_ms", "tpot_ms", "itl_ms", "e2e_ms", "late_ms": {mean, p50, p90, p99, max}, "goodput": {...}, ...}
ordered_json summarize_load(const LoadResult& result, const Slo& slo);

}  // namespace mm
