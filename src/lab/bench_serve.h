// Load on an OpenAI-compatible server, level by level, and the report of it.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "base/json.h"
#include "lab/load_client.h"
#include "lab/load_plan.h"
#include "lab/load_stats.h"

namespace mm {

struct ServeBenchOptions {
  LoadTarget target;
  LoadPlan plan;                 // plan.model may be empty: the first that /v1/models names
  std::vector<int64_t> clients;  // closed-loop levels, then
  std::vector<double> rates;     // open-loop levels, requests a second
  int64_t n_request = 0;         // a level; 0: by time
  double seconds = 10;
  int64_t warmup = -1;  // requests a level; -1: as many as clients, or one second's arrivals
  double timeout = 120;
  bool keep_alive = true;
  int workers = 0;  // 0: one for each eight cores
  Slo slo;
};

// {"bench": "serve", "url", "model", settings, "levels": [see summarize_load, with "clients" or "rate" before and
// "ttft_cdf_ms" behind]}. `on_level` gets each level as it ends. Error when there is no server at all; what fails
// during the load is counted in the levels.
ordered_json bench_serve(const ServeBenchOptions& options, const std::function<void(const ordered_json&)>& on_level);

// A table's lines for the terminal.
std::string serve_table_head();
std::string serve_table_row(const ordered_json& level);

// results.json, report.md, throughput_ttft.svg, throughput_tpot.svg and ttft_cdf.svg. `command` is written into the
// report.
void write_serve_report(const std::string& folder, const ordered_json& result, const std::string& command);

}  // namespace mm
