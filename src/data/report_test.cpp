#include "data/report.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "data/test_data.h"

namespace mm {
namespace {

class ReportTest : public ::testing::Test, public ScratchDir {};

TEST_F(ReportTest, CountsOfChats) {
  const std::string file = write(
      "c.jsonl.gz",
      gzipped(
          R"({"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "abc"}]})"
          "\n"
          "\n"
          R"({"conversations": []})"
          "\n"
          "{\"conversations\": \xff}\n"
          R"({"conversations": [{"role": "user", "content": "a question of many, many, many, many, many words"}, {"role": "assistant", "content": "no"}]})"
          "\n"));
  SampleOptions o;
  o.empty_think_ratio = o.system_ratio = 0;
  o.max_len = 25;
  const DataReport r = report_data(file, &tiny_tokenizer(), o);
  EXPECT_EQ(r.kind, SampleKind::chat);
  EXPECT_EQ(r.rows.rows, 4);
  EXPECT_EQ(r.rows.bad, 2);
  EXPECT_EQ(r.rows.first[0].line, 3);
  EXPECT_EQ(r.rows.first[1].line, 4);
  EXPECT_EQ(r.lengths.size(), 2u);
  EXPECT_EQ(r.truncated, 1);
  EXPECT_EQ(r.without_targets, 1);
  EXPECT_EQ(r.longest_line, 5);
  EXPECT_EQ(r.targets, 5);  // a b c <|im_end|> \n
  EXPECT_EQ(r.tokens, r.lengths[0] + 25);
  EXPECT_EQ(r.length_percentile(50), r.lengths[0]);
  EXPECT_EQ(r.length_percentile(100), r.lengths[1]);
  const ordered_json j = r.to_json();
  EXPECT_EQ(j["bad_rows"], 2);
  EXPECT_EQ(j["first_bad_rows"][0]["line"], 3);
  EXPECT_EQ(j["length"]["max_line"], 5);
  // Without tokenizer: the same rows are bad.
  const DataReport plain = report_data(file, nullptr, o);
  EXPECT_EQ(plain.rows.bad, 2);
  EXPECT_FALSE(plain.to_json().contains("tokens"));
}

TEST_F(ReportTest, LinesByNumber) {
  std::string text;  // more than a chunk
  for (int i = 1; i <= 4000; i++) text += fmt::format("{:<99}\n", i);
  const std::string file = write("l", text + "\nlast");
  for (int i = 2600; i <= 2640; i++) EXPECT_EQ(read_data_line(file, i), fmt::format("{:<99}", i));
  EXPECT_EQ(read_data_line(file, 1), fmt::format("{:<99}", 1));
  EXPECT_EQ(read_data_line(file, 4002), "last");
  for (const int64_t none : {int64_t{4001}, int64_t{4003}, INT64_MAX}) EXPECT_THROW(read_data_line(file, none), Error);
}

TEST_F(ReportTest, PiecesHoldWholeCharacters) {
  const Tokenizer& t = tiny_tokenizer();
  TokenSequence s;
  s.ids = t.encode("a猫b🐱");  // characters without merges: 3 and 4 tokens
  ASSERT_EQ(s.ids.size(), 9u);
  s.is_target = {0, 0, 0, 1, 1, 1, 1, 1, 1};
  auto pieces = token_pieces(t, s);
  ASSERT_EQ(pieces.size(), 4u);
  EXPECT_EQ(pieces[1].text, "猫");
  EXPECT_TRUE(pieces[1].is_target);
  EXPECT_EQ(pieces[3].text, "🐱");
  s.ids = t.encode("\x80\xff猫");  // bytes that begin nothing stand alone
  s.is_target.assign(s.ids.size(), 0);
  pieces = token_pieces(t, s);
  ASSERT_EQ(pieces.size(), 3u);
  EXPECT_EQ(pieces[2].text, "猫");
}

}  // namespace
}  // namespace mm
