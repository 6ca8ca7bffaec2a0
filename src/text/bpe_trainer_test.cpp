#include "text/bpe_trainer.h"

#include "base/thread_team.h"
#include "text/chat_template.h"
#include "text/text_test_files.h"
#include "text/tokenizer_json.h"

namespace mm {
namespace {

TokenizerSpec spec_of(const Tokenizer& t, const std::string& name) {
  const std::string dir = testing::TempDir() + "mm_trained_" + name;
  t.save(dir);
  return parse_tokenizer(read_file(dir + "/tokenizer.json"), read_file(dir + "/tokenizer_config.json"), dir);
}

void expect_same(const TokenizerSpec& got, const TokenizerSpec& want) {
  ASSERT_EQ(got.tokens, want.tokens);
  ASSERT_EQ(got.merges.size(), want.merges.size());
  for (size_t i = 0; i < want.merges.size(); i++) {
    ASSERT_EQ(got.merges[i].left, want.merges[i].left) << "merge " << i;
    ASSERT_EQ(got.merges[i].right, want.merges[i].right) << "merge " << i;
  }
}

Tokenizer train(const std::vector<std::string>& texts, const BpeTrainerOptions& options) {
  BpeTrainer trainer(options);
  trainer.feed(std::vector<std::string_view>(texts.begin(), texts.end()));
  return trainer.train();
}

std::vector<std::string> golden_corpus() {
  std::vector<std::string> texts;
  for (const ordered_json& row : json_lines(kGolden + "/corpus.jsonl")) texts.push_back(row["text"].get<std::string>());
  return texts;
}

class TrainerOracle : public testing::TestWithParam<int> {};

TEST_P(TrainerOracle, SameVocabularyAndMergesAsHf) {
  MM_REQUIRE_SHARED();
  const std::string base = fmt::format("{}/oracle/tokenizer/trained_{}", kShared, GetParam());
  const ordered_json stats = load_json(base + "_stats.json");
  std::vector<std::string> texts;
  for (const ordered_json& row : json_lines(kShared + "/data/sft.jsonl", stats["rows"].get<size_t>())) {
    std::string& text = texts.emplace_back();
    for (const auto& turn : row["conversations"]) {
      if (!text.empty()) text += '\n';
      text += turn["content"].get<std::string>();
    }
  }
  BpeTrainerOptions options;
  options.vocab_size = GetParam();
  options.special_tokens = chatml_special_tokens();
  const Tokenizer t = train(texts, options);
  expect_same(spec_of(t, std::to_string(GetParam())), parse_tokenizer(read_file(base + ".json"), "", base));
  int64_t tokens = 0;
  for (const std::string& text : texts) tokens += static_cast<int64_t>(t.encode(text).size());
  EXPECT_EQ(tokens, stats["tokens_on_training_text"].get<int64_t>());
}

INSTANTIATE_TEST_SUITE_P(Sizes, TrainerOracle, testing::Values(1000, 6400));

TEST(BpeTrainer, SameAsHfForAnyNumberOfThreads) {
  const TokenizerSpec want = parse_tokenizer(read_file(kGolden + "/tokenizer.json"), "", "golden");
  const int threads = num_threads();
  for (const int n : {1, 3}) {
    set_num_threads(n);
    BpeTrainerOptions options;
    options.vocab_size = 600;
    const TokenizerSpec got = spec_of(train(golden_corpus(), options), "golden");
    expect_same(got, want);
    ASSERT_EQ(got.added.size(), 36u);
    for (size_t i = 0; i < 36; i++) {
      EXPECT_EQ(got.added[i].content, want.added[i].content);
      EXPECT_EQ(got.added[i].special, want.added[i].special);
    }
    EXPECT_EQ(got.bos, "<|im_start|>");
    EXPECT_EQ(got.eos, "<|im_end|>");
    EXPECT_EQ(got.pad, "<|endoftext|>");
    EXPECT_EQ(got.chat_template, minimind_chat_template());
  }
  set_num_threads(threads);
}

TEST(BpeTrainer, StaysWithinItsMemory) {
  std::vector<std::string> texts;
  for (int i = 0; i < 40000; i++) texts.push_back(fmt::format("common{} word", i));
  for (int i = 0; i < 40000; i++) texts.push_back(fmt::format(" q{:x}", i * 7919));
  BpeTrainerOptions options;
  options.vocab_size = 300;
  options.max_word_bytes = 100'000;
  BpeTrainer trainer(options);
  trainer.feed(std::vector<std::string_view>(texts.begin(), texts.end()));
  EXPECT_GT(trainer.dropped_words(), 1000);
  EXPECT_LT(trainer.distinct_words() * 32, options.max_word_bytes);
  EXPECT_TRUE(trainer.train().token_to_id("Ġword").has_value());
}

TEST(BpeTrainer, SmallTextsGiveSmallVocabularies) {
  BpeTrainerOptions options;
  options.special_tokens = {};
  const Tokenizer t = train({"abab", ""}, options);
  EXPECT_EQ(t.vocab_size(), 258);  // 256 bytes, ab, abab
  EXPECT_EQ(t.encode("abab").size(), 1u);
  EXPECT_EQ(t.bos_id(), -1);
}

TEST(BpeTrainer, Errors) {
  BpeTrainerOptions options;
  options.vocab_size = 291;
  EXPECT_NE(error_of([&] { BpeTrainer{options}; }).find("at least 292"), std::string::npos);
  options.vocab_size = 300;
  EXPECT_NE(error_of([&] { BpeTrainer{options}.train(); }).find("none"), std::string::npos);
  options.special_tokens = {{"<a>"}, {"<a>"}};
  EXPECT_NE(error_of([&] { BpeTrainer{options}; }).find("<a>"), std::string::npos);
}

}  // namespace
}  // namespace mm
