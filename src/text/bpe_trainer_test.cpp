#include "text/bpe_trainer.h"

#include <gtest/gtest.h>

#include <fstream>

#include "base/fs.h"
#include "base/json.h"
#include "base/thread_team.h"
#include "text/tokenizer_json.h"

namespace mm {
namespace {

const std::string kShared = std::string(MM_SOURCE_DIR) + "/../shared";

class TrainerOracle : public testing::TestWithParam<int> {};

TEST_P(TrainerOracle, SameVocabularyAndMergesAsHf) {
  if (!dir_exists(kShared)) GTEST_SKIP() << "NOT CHECKED: " << kShared << " is missing (tokenizers trained by HF)";
  const std::string base = fmt::format("{}/oracle/tokenizer/trained_{}", kShared, GetParam());
  const ordered_json stats = load_json(base + "_stats.json");
  std::ifstream in(kShared + "/data/sft.jsonl");
  std::vector<std::string> texts;
  std::string line;
  while (texts.size() < stats["rows"].get<size_t>() && std::getline(in, line)) {
    std::string text;
    const ordered_json row = parse_json(line, "sft.jsonl");
    for (const auto& turn : row["conversations"]) {
      if (!text.empty()) text += '\n';
      text += turn["content"].get<std::string>();
    }
    texts.push_back(text);
  }
  BpeTrainerOptions options;
  options.vocab_size = GetParam();
  options.special_tokens = chatml_special_tokens();
  BpeTrainer trainer(options);
  ASSERT_EQ(texts.size(), stats["rows"].get<size_t>());
  trainer.feed(std::vector<std::string_view>(texts.begin(), texts.end()));
  const Tokenizer t = trainer.train();

  const TokenizerSpec want = parse_tokenizer(read_file(base + ".json"), "", base);
  ASSERT_EQ(static_cast<size_t>(t.vocab_size()), want.tokens.size());
  for (size_t i = 0; i < want.tokens.size(); i++) ASSERT_EQ(t.token_to_id(want.tokens[i]), static_cast<int32_t>(i));
  const std::string dir = testing::TempDir() + fmt::format("mm_trained_{}", GetParam());
  t.save(dir);
  const TokenizerSpec got = parse_tokenizer(read_file(dir + "/tokenizer.json"), "", dir);
  ASSERT_EQ(got.merges.size(), want.merges.size());
  for (size_t i = 0; i < want.merges.size(); i++) {
    ASSERT_EQ(got.merges[i].left, want.merges[i].left) << "merge " << i;
    ASSERT_EQ(got.merges[i].right, want.merges[i].right) << "merge " << i;
  }
  int64_t tokens = 0;
  for (const std::string& text : texts) tokens += static_cast<int64_t>(t.encode(text).size());
  EXPECT_EQ(tokens, stats["tokens_on_training_text"].get<int64_t>());
}

INSTANTIATE_TEST_SUITE_P(Sizes, TrainerOracle, testing::Values(1000, 6400));

}  // namespace
}  // namespace mm
