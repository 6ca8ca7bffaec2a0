#include "serve/metrics.h"

#include <gtest/gtest.h>

#include <map>
#include <regex>
#include <set>
#include <sstream>

#include "engine/engine.h"

namespace mm {
namespace {

TEST(Metrics, TextIsWellFormedAndAddsUp) {
  Metrics metrics;
  metrics.count_http("/v1/models", 200);
  metrics.count_http("/v1/models", 200);
  metrics.count_http("/v1/chat/completions", 429);
  EngineEvent e;
  e.finished = true;
  e.finish = FinishReason::length;
  e.prompt_tokens = 10;
  e.cached_tokens = 4;
  e.completion_tokens = 3;
  e.queue_seconds = 0.00005;
  e.first_token_seconds = 0.3;
  e.total_seconds = 1.3;
  metrics.finished(e);
  e.total_seconds = 1000;  // beyond the last bound
  metrics.finished(e);
  e.finish = FinishReason::cancelled;  // counted, not timed
  metrics.finished(e);
  EngineStats stats;
  stats.n_block = 8;
  stats.n_block_used = 2;
  const std::pair<std::string, std::string> info[] = {{"version", "1"}, {"model", "a\"b\\c\nd"}};
  const std::string text = metrics.text(stats, info, 7);

  std::map<std::string, double> values;
  std::set<std::string> typed;
  const std::regex sample(R"(([a-z_][a-z0-9_]*(?:\{(?:[a-z]+="(?:[^"\\]|\\.)*",?)*\})?) (-?[0-9.e+-]+))");
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    if (line.starts_with("# ")) {
      if (line.starts_with("# TYPE ")) {
        EXPECT_TRUE(typed.insert(line.substr(7, line.find(' ', 7) - 7)).second) << line;
      }
      continue;
    }
    std::smatch m;
    ASSERT_TRUE(std::regex_match(line, m, sample)) << line;
    EXPECT_TRUE(values.emplace(m[1], std::stod(m[2])).second) << "twice: " << line;
  }
  EXPECT_EQ(values["minimind_http_requests_total{route=\"/v1/models\",code=\"200\"}"], 2);
  EXPECT_EQ(values["minimind_http_requests_total{route=\"/v1/chat/completions\",code=\"429\"}"], 1);
  EXPECT_EQ(values["minimind_kv_usage_ratio"], 0.25);
  EXPECT_EQ(values["minimind_connections"], 7);
  EXPECT_EQ(values["minimind_answers_total{finish=\"length\"}"], 2);
  EXPECT_EQ(values["minimind_answers_total{finish=\"cancelled\"}"], 1);
  EXPECT_EQ(values["minimind_answered_prompt_tokens_total"], 30);
  const std::string e2e = "minimind_e2e_seconds";
  EXPECT_EQ(values[e2e + "_count"], 2);
  EXPECT_NEAR(values[e2e + "_sum"], 1001.3, 1e-6);
  EXPECT_EQ(values[e2e + "_bucket{le=\"1\"}"], 0);
  EXPECT_EQ(values[e2e + "_bucket{le=\"2\"}"], 1);
  EXPECT_EQ(values[e2e + "_bucket{le=\"600\"}"], 1);
  EXPECT_EQ(values[e2e + "_bucket{le=\"+Inf\"}"], 2);
  EXPECT_EQ(values["minimind_time_per_output_token_seconds_bucket{le=\"0.5\"}"], 1);
  EXPECT_EQ(values["minimind_queue_seconds_bucket{le=\"0.0001\"}"], 2);
}

}  // namespace
}  // namespace mm
