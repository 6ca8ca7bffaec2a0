#include "data/samples.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "base/thread_team.h"
#include "data/sample_stream.h"
#include "data/test_data.h"

namespace mm {
namespace {

Sample parse(const std::string& line, SampleKind kind) {
  SampleParser parser;
  return parser.parse(line, kind);
}

std::string reason(const std::string& line, SampleKind kind) {
  try {
    const Sample s = parse(line, kind);
    render_sample(s, SampleOptions::evaluation(kind, 512), 1);
  } catch (const Error& e) {
    return e.what();
  }
  return "good";
}

// The text of the target tokens, each run in brackets, of a row encoded without random changes.
std::string targets_text(const TokenSequence& s) {
  std::string out;
  for (size_t t = 0; t < s.ids.size(); t++) {
    const bool wanted = s.is_target[t] != 0, before = t > 0 && s.is_target[t - 1] != 0;
    if (wanted && !before) out += "[";
    if (!wanted && before) out += "]";
    if (wanted) out += tiny_tokenizer().token_bytes(s.ids[t]);
  }
  return out + (s.is_target.back() != 0 ? "]" : "");
}

TokenSequence encode(const std::string& line, SampleOptions o, size_t side = 0) {
  return SampleEncoder(tiny_tokenizer(), o).encode(parse(line, o.kind), 1)[side];
}

#define EXPECT_HAS(text, part) EXPECT_NE(std::string(text).find(part), std::string::npos) << (text)

TEST(Samples, PretrainIsBosTextEos) {
  const auto& t = tiny_tokenizer();
  const auto text = t.encode("hello world 你");
  SampleOptions o = SampleOptions::evaluation(SampleKind::pretrain, 512);
  TokenSequence s = encode(R"({"text": "hello world 你"})", o);
  std::vector<int32_t> want = {t.bos_id()};
  want.insert(want.end(), text.begin(), text.end());
  want.push_back(t.eos_id());
  EXPECT_EQ(s.ids, want);
  EXPECT_EQ(s.is_target[0], 0);
  for (size_t i = 1; i < s.is_target.size(); i++) EXPECT_EQ(s.is_target[i], 1);
  // Cut: the text loses its end, EOS stays (max_length - 2 in MiniMind).
  o.max_len = 5;
  s = encode(R"({"text": "hello world 你"})", o);
  EXPECT_EQ(s.ids, (std::vector<int32_t>{want[0], want[1], want[2], want[3], t.eos_id()}));
  EXPECT_EQ(s.full_len, static_cast<int64_t>(want.size()));
  o.max_len = static_cast<int64_t>(want.size());
  EXPECT_EQ(encode(R"({"text": "hello world 你"})", o).ids, want);
  // A padding id inside the text is no target, as labels[input_ids == pad] = -100.
  o.max_len = 512;
  s = encode(R"({"text": "a<|endoftext|>b"})", o);
  EXPECT_EQ(s.ids[2], t.pad_id());
  EXPECT_EQ(s.is_target, (std::vector<uint8_t>{0, 1, 0, 1, 1}));
}

TEST(Samples, ChatTargetsAreTheAssistantsTurns) {
  const std::string row =
      R"({"conversations": [{"role": "system", "content": "S"}, {"role": "user", "content": "hello"},
      {"role": "assistant", "content": "you"}, {"role": "user", "content": "你好"},
      {"role": "assistant", "content": "a", "reasoning_content": "why"}]})";
  SampleOptions o = SampleOptions::evaluation(SampleKind::chat, 512);
  EXPECT_EQ(targets_text(encode(row, o)), "[you<|im_end|>\n][<think>\nwhy\n</think>\n\na<|im_end|>\n]");
  EXPECT_EQ(tiny_tokenizer().decode(encode(row, o).ids),
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nyou<|im_end|>\n"
            "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n<think>\nwhy\n</think>\n\na<|im_end|>\n");
  o.empty_think_ratio = 1;
  EXPECT_EQ(targets_text(encode(row, o)),
            "[<think>\n\n</think>\n\nyou<|im_end|>\n][<think>\nwhy\n</think>\n\na<|im_end|>\n]");
  // Cut within the second answer: targets up to the cut. Cut right behind its marker: none there.
  o.empty_think_ratio = 0;
  const TokenSequence whole = encode(row, o);
  size_t second = whole.ids.size();
  while (whole.is_target[second - 1] != 0) second--;
  o.max_len = static_cast<int64_t>(second) + 2;
  EXPECT_EQ(targets_text(encode(row, o)), "[you<|im_end|>\n][<think>\n]");
  EXPECT_EQ(encode(row, o).full_len, static_cast<int64_t>(whole.ids.size()));
  o.max_len = static_cast<int64_t>(second);
  EXPECT_EQ(targets_text(encode(row, o)), "[you<|im_end|>\n]");
  o.max_len = static_cast<int64_t>(second) - 1;  // the marker itself is cut
  EXPECT_EQ(targets_text(encode(row, o)), "[you<|im_end|>\n]");
}

TEST(Samples, ToolsComeAsJsonStrings) {
  const std::string row =
      R"({"conversations": [{"role": "system", "content": "S", "tools": "[{\"type\": \"function\", \"z\": 1.5, \"a\": null}]"},
      {"role": "user", "content": "q", "tools": null, "tool_calls": ""},
      {"role": "assistant", "content": "", "tool_calls": "[{\"name\": \"f\", \"arguments\": {\"y\": 1, \"x\": \"é\"}}]"},
      {"role": "tool", "content": "r"}, {"role": "assistant", "content": "ok", "tool_calls": null}]})";
  SampleOptions o = SampleOptions::evaluation(SampleKind::chat, 4096);
  o.system_ratio = 1;
  const Sample s = parse(row, SampleKind::chat);
  EXPECT_TRUE(s.has_tools);
  EXPECT_EQ(s.tools.dump(), R"([{"type":"function","z":1.5,"a":null}])");
  const std::string text = render_sample(s, o, 1)[0];
  EXPECT_HAS(text, "<tools>\n{\"type\": \"function\", \"z\": 1.5, \"a\": null}\n</tools>");
  EXPECT_HAS(text, "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"y\": 1, \"x\": \"é\"}}\n</tool_call><|im_end|>\n");
  EXPECT_EQ(targets_text(encode(row, o)),
            "[<tool_call>\n{\"name\": \"f\", \"arguments\": {\"y\": 1, \"x\": "
            "\"é\"}}\n</tool_call><|im_end|>\n][ok<|im_end|>\n]");
  // The same as lists instead of strings.
  const std::string direct =
      R"({"conversations": [{"role": "system", "content": "S", "tools": [{"type": "function", "z": 1.5, "a": null}]},
      {"role": "user", "content": "q"},
      {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"y": 1, "x": "é"}}]},
      {"role": "tool", "content": "r"}, {"role": "assistant", "content": "ok"}]})";
  EXPECT_EQ(render_sample(parse(direct, SampleKind::chat), o, 1)[0], text);
}

TEST(Samples, RandomSystemMessages) {
  SampleOptions o = SampleOptions::evaluation(SampleKind::chat, 512);
  const Sample plain =
      parse(R"({"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]})",
            SampleKind::chat);
  const std::string bare = render_sample(plain, o, 0)[0];
  o.system_ratio = 1;
  std::vector<int> used(10, 0);
  for (uint64_t row = 0; row < 2000; row++) {
    const std::string text = render_sample(plain, o, row)[0];
    EXPECT_EQ(render_sample(plain, o, row)[0], text);
    for (size_t i = 0; i < 10; i++) {
      if (text == "<|im_start|>system\n" + minimind_system_prompts()[i] + "<|im_end|>\n" + bare) used[i]++;
    }
  }
  int total = 0;
  for (const int n : used) {
    EXPECT_GT(n, 140);  // of 200 expected, 4 sigma = 54
    total += n;
  }
  EXPECT_EQ(total, 2000);
  o.system_ratio = 0.2;
  int with = 0;
  for (uint64_t row = 0; row < 10000; row++) with += render_sample(plain, o, row)[0] != bare;
  EXPECT_NEAR(with, 2000, 160);
  o.seed = 43;
  int other = 0;
  for (uint64_t row = 0; row < 10000; row++) other += render_sample(plain, o, row)[0] != bare;
  EXPECT_NE(with, other);
  // Not where there is one already, nor for tools (the string "[]" counts as tools, as in Python).
  o.system_ratio = 1;
  for (
      const char* row :
      {R"({"conversations": [{"role": "system", "content": "S"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]})",
       R"({"conversations": [{"role": "user", "content": "q", "tools": "[]"}, {"role": "assistant", "content": "a"}]})"}) {
    const Sample s = parse(row, SampleKind::chat);
    SampleOptions none = o;
    none.system_ratio = 0;
    EXPECT_EQ(render_sample(s, o, 3), render_sample(s, none, 3));
  }
}

TEST(Samples, EmptyThinkIsKeptForAShareOfRows) {
  SampleOptions o = SampleOptions::evaluation(SampleKind::chat, 512);
  const Sample s =
      parse(R"({"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]})",
            SampleKind::chat);
  o.empty_think_ratio = 0.2;
  int kept = 0;
  for (uint64_t row = 0; row < 10000; row++) kept += render_sample(s, o, row)[0].find("<think>") != std::string::npos;
  EXPECT_NEAR(kept, 2000, 160);
}

TEST(Samples, PreferencePairs) {
  const std::string row = R"({"chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "good"}],
                             "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "bad one"}]})";
  const SampleOptions o = SampleOptions::evaluation(SampleKind::preference, 512);
  EXPECT_EQ(targets_text(encode(row, o, 0)), "[good<|im_end|>\n]");
  EXPECT_EQ(targets_text(encode(row, o, 1)), "[bad one<|im_end|>\n]");
}

TEST(Samples, PromptsEndWhereTheAnswerBegins) {
  const std::string row =
      R"({"conversations": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": ""}], "answer": "4"})";
  SampleOptions o = SampleOptions::evaluation(SampleKind::prompt, 512);
  const TokenSequence s = encode(row, o);
  EXPECT_EQ(tiny_tokenizer().decode(s.ids),
            "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n");
  EXPECT_EQ(s.is_target, std::vector<uint8_t>(s.ids.size(), 0));
  o.max_len = 4;  // cut on the left
  EXPECT_EQ(encode(row, o).ids, std::vector<int32_t>(s.ids.end() - 4, s.ids.end()));
  EXPECT_EQ(parse(row, SampleKind::prompt).answer, "4");
  EXPECT_EQ(parse(R"({"conversations": [{"role": "user", "content": "q"}, {"role": "assistant"}], "gt": ["1", 2]})",
                  SampleKind::prompt)
                .answer,
            "[\"1\",2]");
}

TEST(Samples, BadRowsSayWhatIsWrong) {
  using K = SampleKind;
  EXPECT_EQ(reason(R"({"text": "x"})", K::pretrain), "good");
  EXPECT_HAS(reason("{\"text\": \"x\xff\"}", K::pretrain), "UTF-8");
  EXPECT_HAS(reason(R"({"text": "x")", K::pretrain), "JSON");
  EXPECT_HAS(reason(R"({"text": "\ud800"})", K::pretrain), "JSON");
  EXPECT_HAS(reason(R"({"text": "x"} {"text": "y"})", K::pretrain), "JSON");
  EXPECT_HAS(reason(R"("text")", K::pretrain), "a JSON object, found a string");
  EXPECT_HAS(reason(R"({"txt": "x", "n": 1})", K::pretrain), R"(field "text", found "txt", "n")");
  EXPECT_HAS(reason(R"({"text": 5})", K::pretrain), "found a number");
  EXPECT_HAS(reason(R"({"text": " \n"})", K::pretrain), "empty");
  EXPECT_HAS(reason(std::string(5000, '['), K::pretrain), "JSON");
  const std::string deep = std::string(200, '[') + std::string(200, ']');
  EXPECT_HAS(reason(R"({"conversations": [{"role": "user", "content": )" + deep + "}]}", K::chat), "nested");
  const auto chat = [](const std::string& messages) {
    return reason(R"({"conversations": )" + messages + "}", K::chat);
  };
  EXPECT_EQ(chat(R"([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}])"), "good");
  EXPECT_HAS(chat("[]"), "at least one message");
  EXPECT_HAS(chat("{}"), "a list of messages");
  EXPECT_HAS(chat("[1]"), "conversations[0]");
  EXPECT_HAS(chat(R"([{"role": "user", "content": "q"}])"), "a message of the assistant");
  EXPECT_HAS(chat(R"([{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}])"), "conversations[1]");
  EXPECT_HAS(chat(R"([{"role": "user", "content": 5}, {"role": "assistant", "content": "a"}])"), "conversations[0]");
  EXPECT_HAS(chat(R"([{"role": "human", "content": "q"}, {"role": "assistant", "content": "a"}])"), "role");
  EXPECT_HAS(chat(R"([{"content": "q"}, {"role": "assistant", "content": "a"}])"), "role");
  EXPECT_HAS(chat(R"([{"role": "system", "content": "", "tools": "[{"}, {"role": "assistant", "content": "a"}])"),
             "conversations[0].tools");
  EXPECT_HAS(chat(R"([{"role": "assistant", "content": "", "tool_calls": "{]"}])"), "conversations[0].tool_calls");
  EXPECT_HAS(chat(R"([{"role": "assistant", "content": "", "tool_calls": "[5]"}])"), "tool_call");
  EXPECT_HAS(reason(R"({"chosen": [{"role": "assistant", "content": "a"}]})", K::preference), "rejected");
  EXPECT_HAS(reason(R"({"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}]})",
                    K::prompt),
             "answer");
  EXPECT_HAS(reason(R"({"conversations": [{"role": "user", "content": "q"}], "answer": "1"})", K::prompt),
             "to fill in");
}

TEST(Samples, TokenizerMustSuitTheKind) {
  BpeTrainerOptions options;
  options.vocab_size = 256;
  options.special_tokens = {};
  BpeTrainer trainer(options);
  trainer.feed({"x"});
  const Tokenizer bare = trainer.train();
  EXPECT_THROW(SampleEncoder(bare, SampleOptions::evaluation(SampleKind::pretrain, 512)), Error);
  EXPECT_THROW(SampleEncoder(bare, SampleOptions::evaluation(SampleKind::chat, 512)), Error);
  EXPECT_THROW(SampleEncoder(tiny_tokenizer(), SampleOptions::evaluation(SampleKind::pretrain, 1)), Error);
}

class SampleFiles : public ::testing::Test, public ScratchDir {};

TEST_F(SampleFiles, KindIsSeenInTheFirstRow) {
  EXPECT_EQ(detect_kind(write("a", "{\"text\": \"x\"}\n")), SampleKind::pretrain);
  EXPECT_EQ(detect_kind(write("b", "{\"conversations\": []}")), SampleKind::chat);
  EXPECT_EQ(detect_kind(write("c", "{\"conversations\": [], \"answer\": \"1\"}")), SampleKind::prompt);
  EXPECT_EQ(detect_kind(write("d", "{\"conversations\": [], \"gt\": []}")), SampleKind::prompt);
  EXPECT_EQ(detect_kind(write("e", "{\"rejected\": [], \"chosen\": []}")), SampleKind::preference);
  EXPECT_EQ(detect_kind(write("f.gz", gzipped("\n{bad\n{\"text\": \"x\"}\n"))), SampleKind::pretrain);
  EXPECT_THROW(detect_kind(write("g", "")), Error);
  EXPECT_THROW(detect_kind(write("h", "x\ny\n")), Error);
  EXPECT_THROW(detect_kind(write("i", "{\"foo\": 1}\n")), Error);
  EXPECT_THROW(detect_kind(path("missing")), Error);
}

TEST_F(SampleFiles, StreamKeepsOrderAndNumbersWithAnyThreads) {
  std::string text;
  for (int i = 1; i <= 30000; i++) {
    text += i % 1000 == 0 ? "{\"text\": }\n" : fmt::format("{{\"text\": \"row {} hello 你好\"}}\n", i);
    if (i % 7000 == 0) text += "\n";
  }
  const std::vector<std::string> files = {write("a.jsonl", text),
                                          write("b.jsonl.zst", zstd_compressed("{\"text\": \"last\"}\n"))};
  std::vector<std::pair<int64_t, std::vector<int32_t>>> first;
  for (const int threads : {1, 3}) {
    set_num_threads(threads);
    std::vector<std::pair<int64_t, std::vector<int32_t>>> got;
    BadRows bad;
    stream_samples(files, &tiny_tokenizer(), SampleOptions::evaluation(SampleKind::pretrain, 64), "test",
                   [&](StreamedRow& row) {
                     bad.add(row);
                     got.emplace_back(row.file << 32 | row.line,
                                      row.error.empty() ? row.sequences[0].ids : std::vector<int32_t>{});
                   });
    EXPECT_EQ(bad.rows, 30001);
    EXPECT_EQ(bad.bad, 30);
    EXPECT_EQ(bad.first[7].line, 8001);  // after one blank line
    EXPECT_TRUE(std::is_sorted(got.begin(), got.end(), [](const auto& a, const auto& b) { return a.first < b.first; }));
    if (first.empty()) first = got;
    EXPECT_EQ(got, first);
  }
  set_num_threads(0);
}

const std::string shared = std::string(MM_SOURCE_DIR) + "/../shared";

// The protocol of the recorded evaluations counts these targets.
TEST(SamplesOracle, TargetCountsOfTheEvaluationProtocol) {
  if (!dir_exists(shared)) GTEST_SKIP() << "NOT CHECKED: " << shared << " is missing (recorded target counts)";
  const Tokenizer tokenizer = Tokenizer::load(shared + "/models/minimind-tokenizer");
  const auto count = [&](const std::string& file, SampleKind kind) {
    int64_t n = 0;
    stream_samples({shared + "/data/" + file}, &tokenizer, SampleOptions::evaluation(kind, 512), "test",
                   [&](StreamedRow& row) {
                     EXPECT_EQ(row.error, "");
                     for (const auto& s : row.sequences) n += std::count(s.is_target.begin(), s.is_target.end(), 1);
                   });
    return n;
  };
  EXPECT_EQ(count("pretrain_valid.jsonl", SampleKind::pretrain), 101987);
  EXPECT_EQ(count("sft_valid.jsonl", SampleKind::chat), 34359);
}

TEST(SamplesOracle, EveryFileOfTheDataBundleIsGood) {
  if (!dir_exists(shared)) GTEST_SKIP() << "NOT CHECKED: " << shared << " is missing (data bundle)";
  const std::pair<const char*, int64_t> files[] = {{"sft_valid", 428}, {"reason_valid", 200}, {"rl_math_valid", 400},
                                                   {"dpo_valid", 39},  {"dpo", 353},          {"rl_gsm8k", 1000}};
  for (const auto& [name, rows] : files) {
    const std::string file = shared + "/data/" + name + ".jsonl";
    BadRows bad;
    stream_samples({file}, nullptr, SampleOptions::evaluation(detect_kind(file), 512), "test", [&](StreamedRow& row) {
      bad.add(row);
      EXPECT_EQ(row.error, "") << file << ":" << row.line;
    });
    EXPECT_EQ(bad.rows, rows) << name;
    EXPECT_EQ(bad.bad, 0) << name;
  }
}

}  // namespace
}  // namespace mm
