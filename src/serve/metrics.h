// What the server counts, and its text for Prometheus.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <span>
#include <string>
#include <utility>

#include "engine/request.h"

namespace mm {

struct EngineStats;

// Fixed upper bounds; any thread.
class Histogram {
 public:
  static constexpr std::array<double, 20> bounds = {0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1,
                                                    0.2,    0.5,    1,      2,     5,     10,    20,   60,   120,  600};
  void add(double seconds);
  void append(std::string& out, const char* name, const char* help) const;

 private:
  std::array<std::atomic<int64_t>, bounds.size() + 1> counts_{};
  std::atomic<int64_t> sum_ns_{0};
};

class Metrics {
 public:
  void count_http(std::string_view route, int status);  // any thread
  void finished(const EngineEvent& last);               // the last event of a choice
  // The text of GET /metrics. `info` becomes the labels of minimind_build_info.
  std::string text(const EngineStats& stats, std::span<const std::pair<std::string, std::string>> info,
                   int64_t n_connection) const;

  std::atomic<int64_t> slow_clients{0}, disconnects{0}, stream_events{0}, choices_submitted{0};

 private:
  Histogram queue_, first_token_, per_token_, total_;
  std::array<std::atomic<int64_t>, 5> finish_{};  // by FinishReason
  std::atomic<int64_t> prompt_tokens_{0}, cached_tokens_{0}, completion_tokens_{0};
  mutable std::mutex mutex_;
  std::map<std::pair<std::string, int>, int64_t> http_;  // under mutex_
};

}  // namespace mm
