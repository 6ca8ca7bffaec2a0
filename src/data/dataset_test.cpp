#include "data/dataset.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>

#include "base/error.h"
#include "base/thread_team.h"
#include "data/test_data.h"

namespace mm {
namespace {

struct Row {
  std::vector<int32_t> ids;
  std::vector<uint8_t> is_target;
  bool operator==(const Row&) const = default;
};

std::vector<Row> all_rows(const TokenDataset& d) {
  std::vector<Row> out(static_cast<size_t>(d.rows()));
  for (int64_t i = 0; i < d.rows(); i++) {
    Row& r = out[static_cast<size_t>(i)];
    d.row(i, r.ids, r.is_target);
    EXPECT_EQ(d.row_len(i), static_cast<int64_t>(r.ids.size()));
  }
  return out;
}

std::string text_rows(int n) {
  std::string text;
  for (int i = 0; i < n; i++)
    text += fmt::format("{{\"text\": \"{} hello 你好{}\"}}\n", i, std::string(static_cast<size_t>(i % 40), 'x'));
  return text;
}

SampleOptions text_options(int64_t max_len = 32) {
  SampleOptions o;
  o.max_len = max_len;
  return o;
}

class DatasetTest : public ::testing::Test, public ScratchDir {
 protected:
  TokenDataset build(const std::vector<std::string>& paths, const std::string& cache = "",
                     SampleOptions o = text_options()) const {
    return TokenDataset::build(paths, tiny_tokenizer(), o, cache);
  }
  std::string cache_file() const {
    std::string found;
    for (const auto& e : std::filesystem::directory_iterator(path("cache"))) {
      EXPECT_EQ(found, "") << "two files in the cache";
      found = e.path().string();
    }
    return found;
  }
};

TEST_F(DatasetTest, RowsAreTheEncodedSamples) {
  const std::string a = write("a.jsonl", "{\"text\": \"hello\"}\n\n{\"text\": \"你好 world\"}\n");
  const std::string b = write("b.jsonl", "{\"text\": \"third\"}");
  const TokenDataset d = build({a, b});
  ASSERT_EQ(d.rows(), 3);
  const SampleEncoder encoder(tiny_tokenizer(), text_options());
  SampleParser parser;
  const auto want =
      encoder.encode(parser.parse("{\"text\": \"你好 world\"}", SampleKind::pretrain), row_number(0, 3))[0];
  const auto rows = all_rows(d);
  EXPECT_EQ(rows[1].ids, want.ids);
  EXPECT_EQ(rows[1].is_target, want.is_target);
  EXPECT_EQ(d.source(0), (std::pair<int64_t, int64_t>{0, 1}));
  EXPECT_EQ(d.source(1), (std::pair<int64_t, int64_t>{0, 3}));
  EXPECT_EQ(d.source(2), (std::pair<int64_t, int64_t>{1, 1}));
  EXPECT_EQ(d.source_text(2), b + ":1");
  int64_t tokens = 0, targets = 0, longest = 0;
  for (const Row& r : rows) {
    tokens += static_cast<int64_t>(r.ids.size());
    targets += std::count(r.is_target.begin(), r.is_target.end(), 1);
    longest = std::max(longest, static_cast<int64_t>(r.ids.size()));
  }
  EXPECT_EQ(d.tokens(), tokens);
  EXPECT_EQ(d.targets(), targets);
  EXPECT_EQ(d.max_row_len(), longest);
  EXPECT_EQ(d.truncated(), 0);
}

TEST_F(DatasetTest, SameDataWhateverThreadsCompressionAndCache) {
  const std::string text = text_rows(20000);  // several chunks
  const std::string plain = write("a.jsonl", text), gz = write("a.jsonl.gz", gzipped(text)),
                    zst = write("a.zst", zstd_compressed(text));
  set_num_threads(1);
  const TokenDataset one = build({plain});
  set_num_threads(3);
  const auto rows = all_rows(one);
  EXPECT_GT(one.truncated(), 0);
  for (const TokenDataset& d :
       {build({plain}), build({gz}), build({zst}), build({plain}, path("cache")), build({plain}, path("cache"))}) {
    EXPECT_EQ(d.fingerprint(), one.fingerprint());
    EXPECT_EQ(d.targets(), one.targets());
    EXPECT_EQ(d.truncated(), one.truncated());
    EXPECT_EQ(all_rows(d), rows);
  }
  set_num_threads(0);
}

TEST_F(DatasetTest, ChatDrawsDoNotDependOnThreads) {
  std::string text;
  for (int i = 0; i < 9000; i++) {
    text +=
        fmt::format(
            R"({{"conversations": [{{"role": "user", "content": "{}"}}, {{"role": "assistant", "content": "a"}}]}})",
            i) +
        "\n";
  }
  const std::string file = write("c.jsonl", text);
  SampleOptions o = text_options(128);
  o.kind = SampleKind::chat;
  set_num_threads(1);
  const TokenDataset one = build({file}, "", o);
  set_num_threads(4);
  EXPECT_EQ(build({file}, "", o).fingerprint(), one.fingerprint());
  o.seed = 7;
  EXPECT_NE(build({file}, "", o).fingerprint(), one.fingerprint());
  set_num_threads(0);
}

TEST_F(DatasetTest, CacheIsKeyedByContentTokenizerAndOptions) {
  const std::string file = write("a.jsonl", text_rows(100));
  EXPECT_FALSE(build({file}, path("cache")).from_cache());
  EXPECT_TRUE(build({file}, path("cache")).from_cache());
  EXPECT_TRUE(build({write("moved.jsonl", text_rows(100))}, path("cache")).from_cache());
  EXPECT_EQ(build({path("moved.jsonl")}, path("cache")).source_text(4), path("moved.jsonl") + ":5");
  EXPECT_FALSE(build({file}, path("cache"), text_options(33)).from_cache());
  SampleOptions seed = text_options();
  seed.seed = 1;
  EXPECT_FALSE(build({file}, path("cache"), seed).from_cache());
  EXPECT_FALSE(build({write("a.jsonl", text_rows(101))}, path("cache")).from_cache());
  BpeTrainer trainer({});
  trainer.feed({"other"});
  EXPECT_FALSE(TokenDataset::build({file}, trainer.train(), text_options(), path("cache")).from_cache());
}

TEST_F(DatasetTest, DamagedCacheIsMadeAgain) {
  const std::string file = write("a.jsonl", text_rows(500));
  const auto rows = all_rows(build({file}, path("cache")));
  const std::string cache = cache_file(), whole = read_file(cache);
  std::vector<std::string> damaged = {
      "", "short", whole.substr(0, whole.size() - 1), whole.substr(8), whole + "x", whole.substr(0, whole.size() / 2)};
  for (const size_t at :
       {size_t{0}, whole.size() / 2, whole.size() - 120, whole.size() - 100, whole.size() - 60, whole.size() - 1}) {
    std::string flipped = whole;
    flipped[at] = static_cast<char>(flipped[at] ^ 0x40);
    damaged.push_back(flipped);
  }
  for (const std::string& bytes : damaged) {
    write_file(cache, bytes);
    const TokenDataset d = build({file}, path("cache"));
    EXPECT_FALSE(d.from_cache());
    EXPECT_EQ(all_rows(d), rows);
    EXPECT_EQ(read_file(cache), whole);
  }
}

TEST_F(DatasetTest, UnwritableCacheIsDoneWithout) {
  const std::string file = write("a.jsonl", text_rows(50));
  // A file where the folder should be: cannot be created, whoever runs the test.
  const TokenDataset d = build({file}, write("blocked", "") + "/cache");
  EXPECT_EQ(d.rows(), 50);
  EXPECT_EQ(all_rows(d), all_rows(build({file})));
}

TEST_F(DatasetTest, BadRows) {
  std::string text = text_rows(200);
  text += "{\"text\": 5}\n{bad\n";
  const std::string file = write("a.jsonl", text);
  SampleOptions o = text_options();
  o.max_bad_share = 0.02;
  for (int pass = 0; pass < 2; pass++) {  // the second from the cache
    const TokenDataset d = build({file}, path("cache"), o);
    EXPECT_EQ(d.from_cache(), pass == 1);
    EXPECT_EQ(d.rows(), 200);
    EXPECT_EQ(d.bad_rows().rows, 202);
    EXPECT_EQ(d.bad_rows().bad, 2);
    EXPECT_EQ(d.bad_rows().first[0].line, 201);
    EXPECT_NE(d.bad_rows().first[1].text(d.paths()).find("a.jsonl:202: row: "), std::string::npos);
  }
  o.max_bad_share = 0.005;  // the cache does not hide it
  for (const std::string& cache : {std::string(), path("cache")}) {
    try {
      build({file}, cache, o);
      FAIL();
    } catch (const Error& e) {
      EXPECT_NE(std::string(e.what()).find("2 of 202"), std::string::npos) << e.what();
      EXPECT_NE(std::string(e.what()).find("a.jsonl:201"), std::string::npos) << e.what();
    }
  }
  EXPECT_THROW(build({write("none", "")}, path("cache2")), Error);
  EXPECT_FALSE(dir_exists(path("cache2")) && !std::filesystem::is_empty(path("cache2")));
  EXPECT_THROW(build({write("blank", "\n\n")}), Error);
  o.max_bad_share = 1;
  EXPECT_THROW(build({write("bad", "{\n")}, "", o), Error);
  EXPECT_THROW(build({path("missing")}, "", o), Error);
  EXPECT_THROW(build({}), Error);
  o.kind = SampleKind::preference;
  EXPECT_THROW(build({file}, "", o), Error);
}

TEST_F(DatasetTest, LargeVocabulariesTakeFourBytes) {
  BpeTrainerOptions options;
  options.vocab_size = 256 + 40000;
  options.special_tokens.clear();
  for (const char* s : {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}) options.special_tokens.push_back({s, true});
  for (int i = 0; i < 39997; i++) options.special_tokens.push_back({fmt::format("<|t{}|>", i), true});
  BpeTrainer trainer(options);
  trainer.feed({"x"});
  const Tokenizer t = trainer.train();
  const std::string file = write("a.jsonl", "{\"text\": \"a<|t39990|>b\"}\n");
  const TokenDataset d = TokenDataset::build({file}, t, text_options(), path("cache"));
  std::vector<int32_t> ids;
  std::vector<uint8_t> is_target;
  d.row(0, ids, is_target);
  EXPECT_EQ(ids[2], *t.token_to_id("<|t39990|>"));
  EXPECT_GT(ids[2], 0x7fff);
  EXPECT_EQ(is_target, (std::vector<uint8_t>{0, 1, 1, 1, 1}));
}

TEST_F(DatasetTest, SplitIsDisjointCompleteAndSeeded) {
  const TokenDataset d = build({write("a.jsonl", text_rows(1000))});
  const auto [train, valid] = d.split(0.05, 1);
  EXPECT_EQ(valid.rows(), 50);
  EXPECT_EQ(train.rows(), 950);
  EXPECT_EQ(train.tokens() + valid.tokens(), d.tokens());
  EXPECT_EQ(train.targets() + valid.targets(), d.targets());
  std::set<int64_t> lines;
  for (const TokenDataset& part : {train, valid}) {
    for (int64_t i = 0; i < part.rows(); i++) {
      if (i > 0) {
        EXPECT_LT(part.source(i - 1), part.source(i));
      }
      lines.insert(part.source(i).second);
    }
  }
  EXPECT_EQ(lines.size(), 1000u);
  EXPECT_EQ(d.split(0.05, 1).second.fingerprint(), valid.fingerprint());
  EXPECT_NE(d.split(0.05, 2).second.fingerprint(), valid.fingerprint());
  EXPECT_NE(train.fingerprint(), valid.fingerprint());
  EXPECT_EQ(valid.split(0.5, 3).first.rows(), 25);  // a part of a part
  EXPECT_EQ(all_rows(valid)[7], all_rows(d)[static_cast<size_t>(valid.source(7).second - 1)]);
  EXPECT_EQ(d.split(0.0, 1).second.rows(), 0);
  EXPECT_EQ(d.split(1e-9, 1).second.rows(), 1);
  EXPECT_EQ(d.split(0.99999, 1).first.rows(), 1);
}

}  // namespace
}  // namespace mm
