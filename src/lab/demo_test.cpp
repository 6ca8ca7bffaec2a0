#include "lab/demo.h"

#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>

#include "base/error.h"
#include "base/fs.h"

namespace mm {
namespace {

DemoOptions tiny(const std::string& name) {
  DemoOptions o;
  o.output = testing::TempDir() + "/" + name;
  std::filesystem::remove_all(o.output);
  o.budget = 0.005;
  return o;
}

void quiet(const std::string&) {}

TEST(Demo, MakesATokenizerAModelACurveAndAReport) {
  DemoOptions o = tiny("demo_whole");
  std::vector<std::string> lines;
  const DemoReport report = run_demo(o, [&](const std::string& line) { lines.push_back(line); });
  EXPECT_FALSE(report.interrupted);
  EXPECT_GT(lines.size(), 20u);
  EXPECT_GT(report.pretrain.steps, 3);
  EXPECT_GT(report.sft.steps, 3);
  EXPECT_LT(*report.sft.valid_nll, *report.sft.valid_nll_before);
  EXPECT_EQ(report.additions.asked, 10);
  EXPECT_EQ(report.conversation.size(), 5u);
  EXPECT_NE(read_file(report.loss_plot).find("fine-tuning"), std::string::npos);
  const ordered_json saved = load_json(report.report);
  EXPECT_EQ(saved["held_out_additions"]["asked"], 10);
  EXPECT_EQ(Model::load(report.model)->table.numel(), report.parameters);

  // Digits and line ends are tokens of their own, wherever they stand.
  const Tokenizer tokenizer = Tokenizer::load(report.model);
  EXPECT_EQ(tokenizer.encode("2758").size(), 4u);
  EXPECT_EQ(tokenizer.encode("是27").size(), tokenizer.encode("是").size() + 2);
  EXPECT_EQ(tokenizer.encode("\n\n").size(), 2u);
  std::vector<int32_t> prompt = tokenizer.encode("</think>\n\n");  // what a chat's prompt ends with begins its answer
  const std::vector<int32_t> both = tokenizer.encode("</think>\n\n27"), digits = tokenizer.encode("27");
  prompt.insert(prompt.end(), digits.begin(), digits.end());
  EXPECT_EQ(prompt, both);

  EXPECT_THROW(run_demo(o, quiet), Error);  // nothing is overwritten silently
  o.seed = 43;
  EXPECT_THROW(run_demo(o, quiet), Error);
  EXPECT_EQ(load_json(report.report), saved);
  o.overwrite = true;
  EXPECT_EQ(run_demo(o, quiet).sft.steps, load_json(report.report)["sft"]["steps"].get<int64_t>());
  std::filesystem::remove_all(o.output);
}

// As after Ctrl-C between two stages: what is there is used, what is missing is made, and the end is the same.
TEST(Demo, GoesOnWhereItStopped) {
  const DemoOptions whole = tiny("demo_uninterrupted"), parts = tiny("demo_interrupted");
  run_demo(whole, quiet);
  EXPECT_THROW(run_demo(parts,
                        [](const std::string& line) {
                          if (line.starts_with("[4/6]")) throw Error("stop");
                        }),
               Error);
  bool went_on = false;
  run_demo(parts, [&](const std::string& line) { went_on |= line.starts_with("going on"); });
  EXPECT_TRUE(went_on);
  EXPECT_EQ(read_file(whole.output + "/sft/model.safetensors"), read_file(parts.output + "/sft/model.safetensors"));
  for (const DemoOptions& o : {whole, parts}) std::filesystem::remove_all(o.output);
}

TEST(Demo, RefusesForeignFoldersAndImpossibleBudgets) {
  DemoOptions o = tiny("demo_foreign");
  make_dirs(o.output);
  write_file(o.output + "/mine.txt", "keep me");
  o.overwrite = true;
  EXPECT_THROW(run_demo(o, quiet), Error);
  EXPECT_EQ(read_file(o.output + "/mine.txt"), "keep me");
  std::filesystem::remove_all(o.output);
  for (const double budget : {0.0, -1.0, 11.0, std::nan("")}) {
    o.budget = budget;
    EXPECT_THROW(run_demo(o, quiet), Error) << budget;
    EXPECT_FALSE(dir_exists(o.output));
  }
}

}  // namespace
}  // namespace mm
