#include "text/tokenizer.h"

#include "base/rng.h"
#include "base/thread_team.h"
#include "text/stream_decoder.h"
#include "text/text_test_files.h"
#include "text/tokenizer_json.h"
#include "text/tokenizer_stats.h"
#include "text/unicode.h"

namespace mm {
namespace {

const Tokenizer& golden() {
  static const Tokenizer t = Tokenizer::load(kGolden);
  return t;
}

void check_encode_rows(const Tokenizer& t, const std::string& path, size_t rows_wanted) {
  const auto rows = json_lines(path);
  EXPECT_EQ(rows.size(), rows_wanted);
  for (const ordered_json& row : rows) {
    const auto text = row["text"].get<std::string>();
    const auto ids = row["ids"].get<std::vector<int32_t>>();
    ASSERT_EQ(t.encode(text), ids) << row.dump();
    ASSERT_EQ(t.decode(ids), row["decoded"].get<std::string>());
    ASSERT_EQ(t.decode(ids, true), row["decoded_skip_special"].get<std::string>());
  }
}

std::string random_bytes(Rng& rng, size_t n) {
  std::string s(n, '\0');
  for (char& c : s) c = static_cast<char>(rng.next_u32());
  return s;
}

TEST(TokenizerOracle, EncodesAndDecodesAsTransformers) {
  MM_REQUIRE_SHARED();
  const Tokenizer t = Tokenizer::load(kShared + "/models/minimind-tokenizer");
  EXPECT_EQ(t.vocab_size(), 6400);
  EXPECT_EQ(t.bos_id(), 1);
  EXPECT_EQ(t.eos_id(), 2);
  EXPECT_EQ(t.pad_id(), 0);
  check_encode_rows(t, kShared + "/oracle/tokenizer/encode.jsonl", 782);
}

TEST(Tokenizer, EncodesAndDecodesAsHf) { check_encode_rows(golden(), kGolden + "/encode.jsonl", 189); }

TEST(Tokenizer, DecodesBrokenUtf8AsHf) {
  for (const ordered_json& row : json_lines(kGolden + "/decode.jsonl")) {
    ASSERT_EQ(golden().decode(row["ids"].get<std::vector<int32_t>>()), row["text"].get<std::string>()) << row.dump();
  }
}

TEST(Tokenizer, AddedTokensWithAllFlagsAsHf) {
  const ordered_json base = load_json(kGolden + "/tokenizer.json");
  const auto rows = json_lines(kGolden + "/added.jsonl");
  EXPECT_EQ(rows.size(), 60u);
  for (const ordered_json& row : rows) {
    ordered_json file = base;
    for (const ordered_json& token : row["added"]) file["added_tokens"].push_back(token);
    const Tokenizer t = Tokenizer::from_json(file.dump(), "", "golden");
    const auto ids = row["ids"].get<std::vector<int32_t>>();
    ASSERT_EQ(t.encode(row["text"].get<std::string>()), ids) << row.dump();
    ASSERT_EQ(t.decode(ids), row["decoded"].get<std::string>()) << row.dump();
    ASSERT_EQ(t.decode(ids, true), row["decoded_skip_special"].get<std::string>()) << row.dump();
  }
}

TEST(Tokenizer, AnyBytesComeBack) {
  Rng rng{1};
  for (int i = 0; i < 2000; i++) {
    const std::string bytes = random_bytes(rng, rng.below(60));
    ASSERT_EQ(golden().decode(golden().encode(bytes), false, true), bytes);
  }
}

TEST(Tokenizer, LongWordsDoNotTakeForever) {
  for (const std::string& unit : {std::string("a"), std::string("中"), std::string("hahaha"), std::string("\xff")}) {
    std::string text;
    while (text.size() < (size_t{1} << 20)) text += unit;
    const auto ids = golden().encode(text);
    ASSERT_EQ(golden().decode(ids, false, true), text);
  }
}

// The definition, quadratic: the least rank, leftmost, until none is left.
std::vector<int32_t> merge_by_definition(const TokenizerSpec& spec, std::vector<int32_t> ids) {
  for (;;) {
    size_t best_rank = spec.merges.size(), best = 0;
    for (size_t i = 0; i + 1 < ids.size(); i++) {
      for (size_t r = 0; r < best_rank; r++) {
        if (spec.merges[r].left == ids[i] && spec.merges[r].right == ids[i + 1]) {
          best_rank = r;
          best = i;
        }
      }
    }
    if (best_rank == spec.merges.size()) return ids;
    ids[best] = spec.merges[best_rank].result;
    ids.erase(ids.begin() + static_cast<ptrdiff_t>(best) + 1);
  }
}

TEST(Tokenizer, ShortAndLongWordsMergeByTheDefinition) {
  const TokenizerSpec spec = parse_tokenizer(read_file(kGolden + "/tokenizer.json"), "", "golden");
  Rng rng{2};
  const std::string letters = "abhznle";
  for (const size_t n : {1, 2, 3, 24, 25, 31, 64, 255, 256, 257, 300}) {
    std::string word;
    while (word.size() < n) word += letters[rng.below(letters.size())];
    std::vector<int32_t> ids;
    for (const char c : word) ids.push_back(golden().token_to_id(std::string(1, c)).value());
    ASSERT_EQ(golden().encode(word), merge_by_definition(spec, ids)) << word;
  }
}

TEST(Tokenizer, BatchEqualsOneByOneAndTokenizersShareAThread) {
  std::vector<std::string> texts;
  for (const ordered_json& row : json_lines(kGolden + "/corpus.jsonl")) texts.push_back(row["text"].get<std::string>());
  const std::vector<std::string_view> views(texts.begin(), texts.end());
  const auto batch = golden().encode_batch(views);
  ordered_json file = load_json(kGolden + "/tokenizer.json");
  file["model"]["merges"] = ordered_json::array();
  const Tokenizer bytes_only = Tokenizer::from_json(file.dump(), "", "bytes");
  for (size_t i = 0; i < texts.size(); i++) {
    ASSERT_EQ(golden().encode(texts[i]), batch[i]);
    ASSERT_GE(bytes_only.encode(texts[i]).size(), batch[i].size());  // must not see the other one's cached words
    ASSERT_EQ(bytes_only.decode(bytes_only.encode(texts[i])), texts[i]);
  }
}

TEST(Tokenizer, SavedFilesReadBackEqual) {
  TokenizerSpec spec = parse_tokenizer(read_file(kGolden + "/tokenizer.json"), "", "golden");
  spec.bos = "<|im_start|>";
  spec.eos = "<|im_end|>";
  spec.chat_template = "{{ 'x' }}\n";
  const Tokenizer made = Tokenizer::from_spec(spec);
  const std::string dir = testing::TempDir() + "mm_tokenizer_saved";
  made.save(dir);
  const Tokenizer read = Tokenizer::load(dir);
  EXPECT_EQ(read.fingerprint(), made.fingerprint());
  EXPECT_NE(read.fingerprint(), golden().fingerprint());
  EXPECT_EQ(read.chat_template(), spec.chat_template);
  EXPECT_EQ(read.bos_id(), 1);
  EXPECT_EQ(read.eos_id(), 2);
  EXPECT_EQ(read.pad_id(), -1);
  EXPECT_TRUE(read.is_special(2));
  EXPECT_FALSE(read.is_special(25));  // <think>
  EXPECT_TRUE(read.is_added(25));
  EXPECT_FALSE(read.is_added(36));
  check_encode_rows(read, kGolden + "/encode.jsonl", 189);
}

TEST(Tokenizer, ReadsTheTemplateFromItsOwnFile) {
  const std::string dir = testing::TempDir() + "mm_tokenizer_jinja";
  make_dirs(dir);
  write_file(dir + "/tokenizer.json", read_file(kGolden + "/tokenizer.json"));
  write_file(dir + "/chat_template.jinja", "{{ 1 }}\n");
  EXPECT_EQ(Tokenizer::load(dir).chat_template(), "{{ 1 }}\n");
  write_file(dir + "/tokenizer_config.json", "{\"eos_token\": \"<|im_end|>\", \"chat_template\": \"old\"}");
  const Tokenizer both = Tokenizer::load(dir);
  EXPECT_EQ(both.chat_template(), "{{ 1 }}\n");
  EXPECT_EQ(both.eos_id(), 2);
  write_file(dir + "/chat_template.jinja", "\xff");
  EXPECT_NE(error_of([&] { Tokenizer::load(dir); }).find("chat_template.jinja"), std::string::npos);
}

TEST(Tokenizer, MergesAsStringsAreTheSame) {
  ordered_json file = load_json(kGolden + "/tokenizer.json");
  for (ordered_json& m : file["model"]["merges"]) m = m[0].get<std::string>() + " " + m[1].get<std::string>();
  check_encode_rows(Tokenizer::from_json(file.dump(), "", "strings"), kGolden + "/encode.jsonl", 189);
}

TEST(Tokenizer, ErrorsNameTheField) {
  const ordered_json good = load_json(kGolden + "/tokenizer.json");
  const auto broken = [&](auto&& change) {
    ordered_json file = good;
    change(file);
    return error_of([&] { Tokenizer::from_json(file.dump(), "", "f.json"); });
  };
  const auto expect = [](const std::string& message, const std::string& part) {
    EXPECT_NE(message.find(part), std::string::npos) << "\"" << message << "\" lacks " << part;
  };
  expect(broken([](auto& f) {
           f["normalizer"] = {{"type", "NFC"}};
         }),
         "f.json: normalizer: expected null, found \"NFC\"");
  expect(broken([](auto& f) { f["pre_tokenizer"]["type"] = "Whitespace"; }), "pre_tokenizer");
  expect(broken([](auto& f) { f["pre_tokenizer"] = nullptr; }), "pre_tokenizer");
  expect(broken([](auto& f) { f["pre_tokenizer"]["add_prefix_space"] = true; }), "add_prefix_space");
  expect(broken([](auto& f) { f["pre_tokenizer"]["use_regex"] = false; }), "use_regex");
  expect(broken([](auto& f) { f["decoder"] = nullptr; }), "decoder");
  expect(broken([](auto& f) { f["post_processor"] = {{"type", "BertProcessing"}}; }), "post_processor");
  EXPECT_EQ(broken([](auto& f) { f["post_processor"] = {{"type", "TemplateProcessing"}}; }), "");
  expect(broken([](auto& f) { f["model"]["type"] = "Unigram"; }), "model: type");
  expect(broken([](auto& f) { f["model"]["dropout"] = 0.1; }), "dropout");
  expect(broken([](auto& f) { f["model"]["byte_fallback"] = true; }), "byte_fallback");
  expect(broken([](auto& f) { f["model"]["ignore_merges"] = true; }), "ignore_merges");
  expect(broken([](auto& f) { f["model"]["continuing_subword_prefix"] = "##"; }), "continuing_subword_prefix");
  expect(broken([](auto& f) { f["model"]["end_of_word_suffix"] = 3; }), "end_of_word_suffix");
  expect(broken([](auto& f) { f.erase("model"); }), "field \"model\"");
  expect(broken([](auto& f) { f["model"] = 1; }), "model");
  expect(broken([](auto& f) { f["model"]["vocab"] = ordered_json::array(); }), "vocab");
  expect(broken([](auto& f) { f["model"]["vocab"]["zz"] = "1"; }), "vocab");
  expect(broken([](auto& f) { f["model"]["vocab"]["zz"] = -1; }), "vocab");
  expect(broken([](auto& f) { f["model"]["vocab"]["zz"] = 4'000'000'000; }), "vocab");
  expect(broken([](auto& f) { f["model"]["vocab"]["zz"] = 40; }), "every id used once");
  expect(broken([](auto& f) { f["model"]["vocab"].erase("!"); }), "0x21");
  expect(broken([](auto& f) { f["model"]["merges"][3] = "a"; }), "merges[3]");
  expect(broken([](auto& f) { f["model"]["merges"][3] = {"a", "b", "c"}; }), "merges[3]");
  expect(broken([](auto& f) { f["model"]["merges"][3] = {"a", "<no such>"}; }), "merges[3]");
  expect(broken([](auto& f) { f["model"]["merges"] = "x"; }), "merges");
  expect(broken([](auto& f) { f["added_tokens"][0]["id"] = 7; }), "added_tokens[0]");
  expect(broken([](auto& f) { f["added_tokens"][0]["content"] = ""; }), "added_tokens[0]");
  expect(broken([](auto& f) { f["added_tokens"][0]["single_word"] = true; }), "single_word");
  expect(broken([](auto& f) { f["added_tokens"][0]["special"] = 1; }), "special");
  expect(broken([](auto& f) { f["added_tokens"] = 1; }), "added_tokens");
  expect(error_of([] { Tokenizer::from_json("{\"a\": ", "", "f.json"); }), "f.json");
  expect(error_of([&] { Tokenizer::from_json(good.dump(), "{\"bos_token\": \"nope\"}", "f.json"); }), "bos_token");
  expect(error_of([&] { Tokenizer::from_json(good.dump(), "{\"chat_template\": 1}", "f.json"); }), "chat_template");
  expect(error_of([&] { Tokenizer::from_json(good.dump(), "{\"added_tokens_decoder\": {\"x\": {}}}", "f.json"); }),
         "added_tokens_decoder[x]");
  expect(error_of([] { Tokenizer::load("/nonexistent/tokenizer"); }), "/nonexistent/tokenizer");
  expect(error_of([] { Tokenizer::load(testing::TempDir()); }), "tokenizer.json");
}

TEST(StreamDecoder, JoinsToTheWholeWithoutHalfCharacters) {
  Rng rng{3};
  for (int round = 0; round < 500; round++) {
    std::vector<int32_t> ids(rng.below(40));
    for (int32_t& id : ids) id = static_cast<int32_t>(rng.below(static_cast<uint64_t>(golden().vocab_size()) + 5));
    for (const bool skip : {false, true}) {
      StreamDecoder stream(golden(), skip);
      std::string joined;
      for (const int32_t id : ids) {
        const std::string part = stream.push(id);
        std::string valid;
        append_lossy_utf8(part, true, valid);
        ASSERT_EQ(part, valid);
        joined += part;
      }
      joined += stream.flush();
      ASSERT_EQ(joined, golden().decode(ids, skip));
    }
  }
}

TEST(Unicode, LossyReplacesLongestBeginnings) {
  const auto lossy = [](std::string_view s) {
    std::string out;
    append_lossy_utf8(s, true, out);
    return out;
  };
  const std::string r = "\xEF\xBF\xBD";
  EXPECT_EQ(lossy("a\xE4\xB8"), "a" + r);
  EXPECT_EQ(lossy("\xE4\xB8z"), r + "z");
  EXPECT_EQ(lossy("\xED\xA0\x80"), r + r + r);  // a surrogate
  EXPECT_EQ(lossy("\xC0\x80"), r + r);          // overlong
  EXPECT_EQ(lossy("\xF0\x9F\x98\xF0\x9F\x98\x80"), r + "😀");
  EXPECT_EQ(lossy("\xF4\x90\x80\x80"), r + r + r + r);  // past U+10FFFF
  std::string out;
  EXPECT_EQ(append_lossy_utf8("ab\xF0\x9F\x98", false, out), 2u);
  EXPECT_EQ(out, "ab");
}

TEST(TokenizerStats, CountsBytesTokensAndLanguages) {
  TokenizerStats stats(golden());
  stats.add({"the 中文", "the"});
  const ordered_json usage = stats.usage(), vocabulary = stats.vocabulary();
  EXPECT_EQ(usage["bytes"], 13);
  EXPECT_EQ(usage["characters"], 9);
  EXPECT_DOUBLE_EQ(usage["zh_share"].get<double>(), 6.0 / 13);
  EXPECT_DOUBLE_EQ(usage["en_share"].get<double>(), 6.0 / 13);
  EXPECT_EQ(usage["tokens"], golden().encode("the 中文").size() + golden().encode("the").size());
  EXPECT_EQ(usage["used_ids"].get<int64_t>() + usage["unused_ids"].get<int64_t>(), golden().vocab_size());
  EXPECT_EQ(vocabulary["added_tokens"], 36);
  EXPECT_EQ(vocabulary["byte_tokens"], 256);
}

}  // namespace
}  // namespace mm
