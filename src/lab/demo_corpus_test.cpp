#include "lab/demo_corpus.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <regex>
#include <set>

#include "base/fs.h"
#include "base/json.h"
#include "base/thread_team.h"
#include "data/samples.h"

namespace mm {
namespace {

DemoCorpusOptions small_options(uint64_t seed = 42) {
  DemoCorpusOptions o;
  o.seed = seed;
  o.pretrain_rows = 6000;
  o.sft_rows = 6000;
  return o;
}

struct Corpus {
  DemoCorpusOptions options;
  std::map<std::string, std::vector<ordered_json>> rows;  // "pretrain", "sft", "valid"
  std::map<std::string, std::string> bytes;
};

std::vector<ordered_json> parse_lines(const std::string& content, const std::string& where) {
  std::vector<ordered_json> rows;
  for (size_t i = 0; i < content.size();) {
    const size_t end = content.find('\n', i);
    rows.push_back(parse_json(std::string_view(content).substr(i, end - i), where));
    i = end + 1;
  }
  return rows;
}

Corpus make_corpus(const DemoCorpusOptions& options) {
  const std::string dir = testing::TempDir() + "/demo_corpus_test";
  std::filesystem::remove_all(dir);
  Corpus c;
  c.options = options;
  const DemoCorpusFiles files = write_demo_corpus(dir, options);
  c.bytes = {
      {"pretrain", read_file(files.pretrain)}, {"sft", read_file(files.sft)}, {"valid", read_file(files.sft_valid)}};
  for (const auto& [name, content] : c.bytes) c.rows[name] = parse_lines(content, name);
  std::filesystem::remove_all(dir);
  return c;
}

const Corpus& corpus() {
  static const Corpus c = make_corpus(small_options());
  return c;
}

std::vector<int64_t> numbers_in(const std::string& text) {
  std::vector<int64_t> list;
  static const std::regex number("[0-9]+");
  for (auto it = std::sregex_iterator(text.begin(), text.end(), number); it != std::sregex_iterator(); ++it) {
    list.push_back(std::stoll(it->str()));
  }
  return list;
}

// Two numbers of the list that are a held-out pair, or nothing.
std::optional<std::pair<int64_t, int64_t>> held_out_pair(uint64_t seed, const std::vector<int64_t>& list,
                                                         bool with_sum) {
  for (const int64_t a : list) {
    for (const int64_t b : list) {
      if (a > 99 || b > 99 || !demo_pair_held_out(seed, static_cast<int>(a), static_cast<int>(b))) continue;
      if (!with_sum || std::find(list.begin(), list.end(), a + b) != list.end()) return {{a, b}};
    }
  }
  return std::nullopt;
}

TEST(DemoCorpus, SameOptionsGiveTheSameBytesOnAnyNumberOfThreads) {
  const int threads = num_threads();
  set_num_threads(1);
  const Corpus again = make_corpus(small_options());
  set_num_threads(threads);
  EXPECT_EQ(corpus().bytes, again.bytes);
  EXPECT_NE(corpus().bytes.at("sft"), make_corpus(small_options(43)).bytes.at("sft"));
}

TEST(DemoCorpus, ATenthOfThePairsIsHeldOutSymmetrically) {
  int held = 0;
  for (int a = 10; a < 100; a++) {
    for (int b = 10; b < 100; b++) {
      EXPECT_EQ(demo_pair_held_out(42, a, b), demo_pair_held_out(42, b, a));
      held += demo_pair_held_out(42, a, b);
    }
  }
  EXPECT_NEAR(held / 8100.0, 0.1, 0.02);
  for (int a = 0; a < 200; a++) EXPECT_FALSE(demo_pair_held_out(42, a, 5) || demo_pair_held_out(42, 105, a));
}

// Looks at the written text alone, not at how it was made.
TEST(DemoCorpus, HeldOutSumsOccurInNoTrainingRow) {
  const uint64_t seed = corpus().options.seed;
  static const std::regex joined("([0-9]+) ?(?:\\+|-|plus|minus|and|加上?|减去?|和) ?([0-9]+)");
  int64_t pairs_seen = 0;
  for (const char* part : {"pretrain", "sft"}) {
    for (const ordered_json& row : corpus().rows.at(part)) {
      const std::string line = row.dump();
      ASSERT_FALSE(held_out_pair(seed, numbers_in(line), true)) << line;
      if (row.contains("text")) {
        const std::string text = row["text"];
        ASSERT_FALSE(held_out_pair(seed, numbers_in(text.substr(0, text.find('\n'))), false)) << line;
      } else {
        for (const auto& m : row["conversations"]) {
          if (m["role"] != "user") continue;
          ASSERT_FALSE(held_out_pair(seed, numbers_in(m["content"]), false)) << line;
        }
      }
      for (auto it = std::sregex_iterator(line.begin(), line.end(), joined); it != std::sregex_iterator(); ++it) {
        const int64_t a = std::stoll((*it)[1]), b = std::stoll((*it)[2]);
        if (a > 99 || b > 99) continue;
        pairs_seen += a > 9 && b > 9;
        const bool adds = it->str().find('-') == std::string::npos && it->str().find("minus") == std::string::npos;
        ASSERT_FALSE(adds && demo_pair_held_out(seed, static_cast<int>(a), static_cast<int>(b))) << line;
      }
    }
  }
  EXPECT_GT(pairs_seen, 5000);  // the patterns do find sums
}

TEST(DemoCorpus, EveryWrittenEquationIsTrue) {
  static const std::regex equation("([0-9]+)([-+*])([0-9]+)(?:([-+])([0-9]+))? ?= ?([0-9]+)");
  int64_t seen = 0;
  for (const auto& [part, rows] : corpus().rows) {
    for (const ordered_json& row : rows) {
      const std::string line = row.dump();
      for (auto it = std::sregex_iterator(line.begin(), line.end(), equation); it != std::sregex_iterator(); ++it) {
        const std::smatch& m = *it;
        int64_t value = std::stoll(m[1]);
        const auto apply = [&](const std::string& op, int64_t x) {
          value = op == "+" ? value + x : op == "-" ? value - x : value * x;
        };
        apply(m[2], std::stoll(m[3]));
        if (m[4].matched) apply(m[4], std::stoll(m[5]));
        ASSERT_EQ(value, std::stoll(m[6])) << m.str() << " in " << line;
        seen++;
      }
    }
  }
  EXPECT_GT(seen, 10000);
}

TEST(DemoCorpus, RowsAreMiniMindSamplesOfEveryKind) {
  SampleParser parser;
  int thinking = 0, tool_calls = 0, chinese = 0, several_turns = 0;
  for (const auto& [part, rows] : corpus().rows) {
    const SampleKind kind = part == "pretrain" ? SampleKind::pretrain : SampleKind::chat;
    for (const ordered_json& row : rows) {
      const std::string line = row.dump();
      ASSERT_NO_THROW(parser.parse(line, kind)) << line;
      chinese += std::any_of(line.begin(), line.end(), [](char c) { return static_cast<unsigned char>(c) >= 0xe4; });
      if (kind == SampleKind::pretrain) continue;
      int users = 0;
      const auto& list = row["conversations"];
      for (size_t i = 0; i < list.size(); i++) {
        users += list[i]["role"] == "user";
        thinking += list[i].contains("reasoning_content");
        if (!list[i].contains("tool_calls")) continue;
        tool_calls++;
        const auto calls = parse_json(list[i]["tool_calls"].get<std::string>(), line);
        EXPECT_EQ(calls[0]["name"], "calculate");
        ASSERT_EQ(list[i + 1]["role"], "tool");
        const auto result = parse_json(list[i + 1]["content"].get<std::string>(), line)["result"].get<int64_t>();
        EXPECT_EQ(demo_last_number(list[i + 2]["content"].get<std::string>()), result);
        EXPECT_TRUE(list[0].contains("tools"));
      }
      several_turns += users > 1;
    }
  }
  EXPECT_GT(thinking, 500);
  EXPECT_GT(tool_calls, 150);
  EXPECT_GT(chinese, 5000);
  EXPECT_GT(several_turns, 500);
}

TEST(DemoCorpus, AdditionQuestionsAreHeldOutAndAnswered) {
  const auto questions = demo_addition_questions(corpus().options, 200);
  ASSERT_EQ(questions.size(), 200u);
  std::set<std::pair<int64_t, int64_t>> pairs;
  int chinese = 0;
  for (const DemoQuestion& q : questions) {
    const auto n = numbers_in(q.text);
    ASSERT_EQ(n.size(), 2u) << q.text;
    EXPECT_TRUE(demo_pair_held_out(corpus().options.seed, static_cast<int>(n[0]), static_cast<int>(n[1])));
    EXPECT_EQ(std::to_string(n[0] + n[1]), q.expected);
    pairs.emplace(n[0], n[1]);
    chinese += q.zh;
  }
  EXPECT_EQ(chinese, 100);
  EXPECT_GT(pairs.size(), 150u);
}

TEST(DemoCorpus, FactQuestionsAreNotAskedInTraining) {
  std::set<std::string> asked;
  for (const ordered_json& row : corpus().rows.at("sft")) {
    for (const auto& m : row["conversations"]) {
      if (m["role"] == "user") asked.insert(m["content"].get<std::string>());
    }
  }
  const auto questions = demo_fact_questions(corpus().options, 200);
  ASSERT_EQ(questions.size(), 200u);
  for (const DemoQuestion& q : questions) {
    EXPECT_FALSE(asked.count(q.text)) << q.text;
    EXPECT_FALSE(q.expected.empty());
    EXPECT_EQ(corpus().bytes.at("pretrain").find(q.text), std::string::npos) << q.text;
  }
}

TEST(DemoCorpus, LastNumber) {
  EXPECT_EQ(demo_last_number("27+58: ones 7+8=15. The answer is 85."), 85);
  EXPECT_EQ(demo_last_number("答案是105。"), 105);
  EXPECT_EQ(demo_last_number("no digits"), std::nullopt);
  EXPECT_EQ(demo_last_number(""), std::nullopt);
  EXPECT_TRUE(demo_last_number(std::string(100, '9')).has_value());  // cut, not out of range
}

}  // namespace
}  // namespace mm
