#include "train/metrics.h"

#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>

#include "base/fs.h"
#include "base/json.h"

namespace mm {

static std::string fresh_dir(const char* name) {
  const std::string dir = testing::TempDir() + name;
  std::filesystem::remove_all(dir);
  return dir;
}

static std::vector<ordered_json> lines_of(const std::string& dir) {
  const std::string text = read_file(dir + "/metrics.jsonl");
  std::vector<ordered_json> out;
  for (size_t at = 0; at < text.size();) {
    const size_t end = text.find('\n', at);
    EXPECT_NE(end, std::string::npos);
    out.push_back(parse_json(text.substr(at, end - at), "line"));
    at = end + 1;
  }
  return out;
}

TEST(Metrics, OneLineAStep) {
  const std::string dir = fresh_dir("metrics_lines");
  Metrics metrics(dir, 0);
  metrics.log(1, {{"loss", 8.75}, {"lr", 5e-4}});
  metrics.log(2, {{"loss", std::nan("")}, {"grad_norm", INFINITY}});
  const auto lines = lines_of(dir);  // readable while the run goes on
  ASSERT_EQ(lines.size(), 2u);
  EXPECT_EQ(lines[0].begin().key(), "step");
  EXPECT_EQ(lines[0]["step"], 1);
  EXPECT_EQ(lines[0]["loss"], 8.75);
  EXPECT_EQ(lines[0]["lr"], 5e-4);
  EXPECT_GT(lines[0]["time"], 1.6e9);
  EXPECT_TRUE(lines[1]["loss"].is_null());
  EXPECT_TRUE(lines[1]["grad_norm"].is_null());
}

TEST(Metrics, ResumeRemovesLaterAndBrokenLines) {
  const std::string dir = fresh_dir("metrics_resume");
  {
    Metrics metrics(dir, 0);
    for (int64_t step = 1; step <= 40; step++) metrics.log(step, {{"loss", 1.0}});
  }
  {
    AppendFile killed(dir + "/metrics.jsonl");
    killed.write("{\"step\":41,\"lo");
  }
  {
    Metrics metrics(dir, 30);
    metrics.log(31, {{"loss", 2.0}});
  }
  const auto lines = lines_of(dir);
  ASSERT_EQ(lines.size(), 31u);
  for (size_t i = 0; i < 31; i++) EXPECT_EQ(lines[i]["step"], i + 1);
  EXPECT_EQ(lines[30]["loss"], 2.0);
  const auto n_files = std::distance(std::filesystem::directory_iterator(dir + "/tensorboard"), {});
  EXPECT_EQ(n_files, 2);
}

TEST(Metrics, ACutLineOfAKeptStepGoesToo) {
  const std::string dir = fresh_dir("metrics_cut");
  make_dirs(dir);
  write_file(dir + "/metrics.jsonl", "{\"step\":1,\"loss\":1}\nnot json\n{\"step\":2,\"loss\":1}");
  { const Metrics metrics(dir, 10); }
  EXPECT_EQ(read_file(dir + "/metrics.jsonl"), "{\"step\":1,\"loss\":1}\n");
}

TEST(Metrics, ANewRunStartsEmpty) {
  const std::string dir = fresh_dir("metrics_new");
  { Metrics(dir, 0).log(7, {{"loss", 1.0}}); }
  { Metrics(dir, 0).log(1, {{"loss", 3.0}}); }
  const auto lines = lines_of(dir);
  ASSERT_EQ(lines.size(), 1u);
  EXPECT_EQ(lines[0]["loss"], 3.0);
}

}  // namespace mm
