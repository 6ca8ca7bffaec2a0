#include "serve/metrics.h"

#include <fmt/format.h>

#include <algorithm>
#include <iterator>

#include "engine/engine.h"

namespace mm {

void Histogram::add(double seconds) {
  const auto at = std::lower_bound(bounds.begin(), bounds.end(), seconds) - bounds.begin();
  counts_[static_cast<size_t>(at)].fetch_add(1, std::memory_order_relaxed);
  sum_ns_.fetch_add(static_cast<int64_t>(seconds * 1e9), std::memory_order_relaxed);
}

static void head(std::string& out, const char* name, const char* type, const char* help) {
  fmt::format_to(std::back_inserter(out), "# HELP {0} {2}\n# TYPE {0} {1}\n", name, type, help);
}

void Histogram::append(std::string& out, const char* name, const char* help) const {
  head(out, name, "histogram", help);
  int64_t total = 0;
  for (size_t i = 0; i < bounds.size(); i++) {
    total += counts_[i].load(std::memory_order_relaxed);
    fmt::format_to(std::back_inserter(out), "{}_bucket{{le=\"{}\"}} {}\n", name, bounds[i], total);
  }
  total += counts_.back().load(std::memory_order_relaxed);
  fmt::format_to(std::back_inserter(out), "{0}_bucket{{le=\"+Inf\"}} {1}\n{0}_sum {2}\n{0}_count {1}\n", name, total,
                 static_cast<double>(sum_ns_.load(std::memory_order_relaxed)) * 1e-9);
}

void Metrics::count_http(std::string_view route, int status) {
  const std::lock_guard lock(mutex_);
  http_[{std::string(route), status}]++;
}

void Metrics::finished(const EngineEvent& e) {
  finish_.at(static_cast<size_t>(e.finish)).fetch_add(1, std::memory_order_relaxed);
  completion_tokens_.fetch_add(e.completion_tokens, std::memory_order_relaxed);
  if (e.choice == 0) {
    prompt_tokens_.fetch_add(e.prompt_tokens, std::memory_order_relaxed);
    cached_tokens_.fetch_add(e.cached_tokens, std::memory_order_relaxed);
  }
  if (e.finish != FinishReason::stop && e.finish != FinishReason::length) return;
  queue_.add(e.queue_seconds);
  total_.add(e.total_seconds);
  if (e.completion_tokens >= 1) first_token_.add(e.first_token_seconds);
  if (e.completion_tokens >= 2)
    per_token_.add((e.total_seconds - e.first_token_seconds) / static_cast<double>(e.completion_tokens - 1));
}

static std::string escaped_label(std::string_view text) {
  std::string out;
  for (const char c : text) {
    if (c == '\\' || c == '"') out += '\\';
    if (c == '\n') out += "\\n";
    else out += c;
  }
  return out;
}

std::string Metrics::text(const EngineStats& s, std::span<const std::pair<std::string, std::string>> info,
                          int64_t n_connection) const {
  std::string out;
  const auto one = [&](const char* name, const char* type, const char* help, auto value) {
    head(out, name, type, help);
    fmt::format_to(std::back_inserter(out), "{} {}\n", name, value);
  };
  const auto gauge = [&](const char* name, const char* help, auto value) { one(name, "gauge", help, value); };
  const auto counter = [&](const char* name, const char* help, auto value) { one(name, "counter", help, value); };

  head(out, "minimind_build_info", "gauge", "What runs; always 1.");
  out += "minimind_build_info{";
  for (size_t i = 0; i < info.size(); i++)
    fmt::format_to(std::back_inserter(out), "{}{}=\"{}\"", i > 0 ? "," : "", info[i].first,
                   escaped_label(info[i].second));
  out += "} 1\n";
  gauge("minimind_uptime_seconds", "Since the engine started.", s.seconds);
  gauge("minimind_connections", "Open HTTP connections.", n_connection);

  gauge("minimind_requests_waiting", "In the queue.", s.n_waiting);
  gauge("minimind_requests_running", "Sequences in the batch.", s.n_running);
  gauge("minimind_kv_blocks", "Blocks of the KV pool.", s.n_block);
  gauge("minimind_kv_blocks_used", "Of them, used by sequences.", s.n_block_used);
  gauge("minimind_kv_blocks_cached", "Of them, kept for their prefix alone.", s.n_block_cached);
  gauge("minimind_kv_usage_ratio", "Share of the pool used by sequences.",
        s.n_block > 0 ? static_cast<double>(s.n_block_used) / static_cast<double>(s.n_block) : 0.0);
  gauge("minimind_kv_block_tokens", "Tokens a block.", s.block_size);

  counter("minimind_engine_steps_total", "Steps of the engine.", s.n_step);
  counter("minimind_requests_submitted_total", "Prompts taken into the queue.", s.n_submitted);
  counter("minimind_requests_rejected_total", "Prompts refused because the queue was full.", s.n_rejected);
  counter("minimind_requests_finished_total", "Choices answered in full.", s.n_finished);
  counter("minimind_requests_cancelled_total", "Choices cancelled, mostly because the client left.", s.n_cancelled);
  counter("minimind_requests_timed_out_total", "Choices past their deadline.", s.n_timed_out);
  counter("minimind_requests_failed_total", "Choices ended by an error of the engine.", s.n_failed);
  counter("minimind_preemptions_total", "Sequences put back for want of blocks.", s.n_preempted);
  counter("minimind_prompt_tokens_total", "Prompt tokens of ended requests, counted by the engine.", s.prompt_tokens);
  counter("minimind_prefix_hit_tokens_total", "Of them, found in the prefix cache.", s.cached_tokens);
  counter("minimind_generated_tokens_total", "Tokens generated.", s.generated_tokens);
  counter("minimind_draft_tokens_total", "Tokens proposed by speculation.", s.draft_tokens);
  counter("minimind_accepted_tokens_total", "Of them, accepted.", s.accepted_tokens);
  counter("minimind_slow_clients_total", "Connections closed because the client did not read.", slow_clients.load());
  counter("minimind_disconnects_total", "Clients that left before their answer was complete.", disconnects.load());
  counter("minimind_stream_events_total", "Events of the engine handed to connections.", stream_events.load());

  counter("minimind_choices_submitted_total", "Choices of the prompts taken.", choices_submitted.load());
  head(out, "minimind_answers_total", "counter", "Choices ended, by how; in the end as many as were submitted.");
  for (size_t i = 0; i < finish_.size(); i++) {
    fmt::format_to(std::back_inserter(out), "minimind_answers_total{{finish=\"{}\"}} {}\n",
                   finish_reason_name(static_cast<FinishReason>(i)), finish_[i].load());
  }
  counter("minimind_answered_prompt_tokens_total", "Prompt tokens of ended requests.", prompt_tokens_.load());
  counter("minimind_answered_cached_tokens_total", "Of them, found in the prefix cache.", cached_tokens_.load());
  counter("minimind_answered_completion_tokens_total", "Completion tokens of ended requests.",
          completion_tokens_.load());

  queue_.append(out, "minimind_queue_seconds", "From submission to the first step.");
  first_token_.append(out, "minimind_time_to_first_token_seconds", "From submission to the first token.");
  per_token_.append(out, "minimind_time_per_output_token_seconds",
                    "Mean over the tokens behind the first of a choice.");
  total_.append(out, "minimind_e2e_seconds", "From submission to the last token.");

  head(out, "minimind_http_requests_total", "counter", "HTTP requests by route and status.");
  const std::lock_guard lock(mutex_);
  for (const auto& [key, count] : http_) {
    fmt::format_to(std::back_inserter(out), "minimind_http_requests_total{{route=\"{}\",code=\"{}\"}} {}\n", key.first,
                   key.second, count);
  }
  return out;
}

}  // namespace mm
