// How the world becomes rows: the mix of kinds, the filter that keeps held-out sums out, and the files.
#include "lab/demo_corpus.h"

#include <algorithm>
#include <array>

#include "base/error.h"
#include "base/fs.h"
#include "base/json.h"
#include "base/rng.h"
#include "base/thread_team.h"
#include "lab/demo_world.h"

namespace mm {

namespace {

using demo::chance;
using demo::Qa;

// Streams of the counter-based generator: one a file, and within it one a row.
enum class Stream : uint64_t {
  pretrain = 1,
  sft = 2,
  valid = 3,
  additions = 4,
  facts = 5,
  held_out = 6,
  two_steps = 7
};

Rng row_rng(uint64_t seed, Stream stream, int64_t row, int attempt = 0) {
  return {seed, static_cast<uint64_t>(stream) << 56 | static_cast<uint64_t>(attempt) << 40 | static_cast<uint64_t>(row),
          0};
}

// The whole numbers 0..999 in a text, as a set.
struct Numbers {
  std::vector<int> values;
  explicit Numbers(std::string_view text) {
    for (size_t i = 0; i < text.size();) {
      if (text[i] < '0' || text[i] > '9') {
        i++;
        continue;
      }
      size_t end = i;
      int value = 0;
      while (end < text.size() && text[end] >= '0' && text[end] <= '9')
        value = std::min(value * 10 + (text[end++] - '0'), 1000);
      if (value < 1000 && std::find(values.begin(), values.end(), value) == values.end()) values.push_back(value);
      i = end;
    }
  }
  bool has(int v) const { return std::find(values.begin(), values.end(), v) != values.end(); }
};

bool asks_held_out(uint64_t seed, std::string_view question) {
  const Numbers n(question);
  for (const int a : n.values) {
    for (const int b : n.values) {
      if (demo_pair_held_out(seed, a, b)) return true;
    }
  }
  return false;
}

bool tells_held_out(uint64_t seed, std::string_view row) {
  const Numbers n(row);
  for (const int a : n.values) {
    for (const int b : n.values) {
      if (demo_pair_held_out(seed, a, b) && n.has(a + b)) return true;
    }
  }
  return false;
}

demo::PairFilter filter_of(uint64_t seed) {
  return [seed](int a, int b) { return demo_pair_held_out(seed, a, b); };
}

// Shares of the kinds in pretraining text. Sums are a quarter: they need many repetitions until copying digits is
// learnt. Facts are also asked and answered here: facts that pretraining only states are learnt, but not found by a
// question.
std::string pretrain_text(uint64_t seed, Rng& rng) {
  const bool zh = chance(rng, 0.5);
  const float kind = rng.uniform();
  const auto filter = filter_of(seed);
  const auto plain = [](const Qa& qa) { return qa.question + "\n" + qa.answer; };
  const auto [a, b] = demo::random_pair(rng, filter);
  if (kind < 0.22f) return plain({demo::addition_question(rng, zh, a, b), "", demo::addition_answer(zh, a, b)});
  if (kind < 0.31f) return plain(demo::two_step_qa(rng, zh, a, b, filter, false));
  if (kind < 0.39f) return plain(demo::subtraction_qa(rng, zh, filter));
  if (kind < 0.43f) return plain(demo::number_qa(rng, zh, filter));
  std::string text;
  const bool asked = kind < 0.75f;
  const uint64_t n = asked ? 1 + rng.below(3) : 2 + rng.below(4);
  for (uint64_t i = 0; i < n; i++) {
    if (i > 0) text += asked ? "\n" : zh ? "" : " ";
    text += asked ? plain(demo::fact_qa(rng, demo::random_fact(rng, zh, false), false)) : demo::fact_statement(rng, zh);
  }
  return text;
}

ordered_json message(const char* role, const std::string& content) { return {{"role", role}, {"content", content}}; }

void add_turn(ordered_json& list, const Qa& qa) {
  list.push_back(message("user", qa.question));
  list.push_back(message("assistant", qa.answer));
  if (!qa.think.empty()) list.back()["reasoning_content"] = qa.think;
}

// valid: sums of held-out pairs and held-out wordings of facts instead of the training set's.
Qa chat_qa(uint64_t seed, Rng& rng, bool zh, bool valid) {
  const auto filter = filter_of(seed);
  const float kind = rng.uniform();
  const auto [a, b] = demo::random_pair(rng, [&](int x, int y) { return filter(x, y) != valid; });
  if (kind < 0.22f) return {demo::addition_question(rng, zh, a, b), "", demo::addition_answer(zh, a, b)};
  // Mostly with thinking, so that an open <think> is always filled; some without, for the closed one.
  if (kind < 0.34f) return demo::two_step_qa(rng, zh, a, b, filter, chance(rng, 0.85));
  if (kind < 0.41f) return demo::subtraction_qa(rng, zh, filter);
  if (kind < 0.44f) return demo::number_qa(rng, zh, filter);
  if (kind < 0.51f) return demo::identity_qa(rng, zh);
  if (kind < 0.61f) return demo::talk_qa(rng, zh);
  return demo::fact_qa(rng, demo::random_fact(rng, zh, valid), chance(rng, 0.15));
}

ordered_json tool_messages(Rng& rng, bool zh, bool valid) {
  ordered_json list = ordered_json::array();
  list.push_back(message("system", demo::system_prompt(rng, zh)));
  list.back()["tools"] = demo_calculator_tools();
  if (chance(rng, 0.15)) {  // a tool is offered, the question needs none
    add_turn(list,
             chance(rng, 0.5) ? demo::talk_qa(rng, zh) : demo::fact_qa(rng, demo::random_fact(rng, zh, valid), false));
    return list;
  }
  const demo::ToolUse use = demo::calculator_use(rng, zh);
  list.push_back(message("user", use.question));
  list.push_back(message("assistant", ""));
  list.back()["tool_calls"] =
      ordered_json::array({{{"name", "calculate"}, {"arguments", {{"expression", use.expression}}}}}).dump();
  list.push_back(message("tool", ordered_json{{"result", use.result}}.dump()));
  list.push_back(message("assistant", use.answer));
  return list;
}

ordered_json chat_row(uint64_t seed, Rng& rng, bool valid) {
  const bool zh = chance(rng, 0.5);
  if (chance(rng, 0.06)) return {{"conversations", tool_messages(rng, zh, valid)}};
  ordered_json list = ordered_json::array();
  if (chance(rng, 0.08)) list.push_back(message("system", demo::system_prompt(rng, zh)));
  const uint64_t turns = chance(rng, 0.2) ? 2 + rng.below(2) : 1;
  for (uint64_t i = 0; i < turns; i++) add_turn(list, chat_qa(seed, rng, zh, valid));
  return {{"conversations", list}};
}

bool keeps_held_out(uint64_t seed, const ordered_json& row, const std::string& line) {
  if (tells_held_out(seed, line)) return false;
  if (row.contains("text")) {
    const std::string_view text = row["text"].get_ref<const std::string&>();
    return !asks_held_out(seed, text.substr(0, text.find('\n')));
  }
  for (const auto& m : row["conversations"]) {
    if (m["role"] == "user" && asks_held_out(seed, m["content"].get_ref<const std::string&>())) return false;
  }
  return true;
}

// Rows are independent of each other, so all cores make them; the file is written in order.
template <class Make>
void write_rows(const std::string& path, Stream stream, const DemoCorpusOptions& o, int64_t rows, const Make& make) {
  std::vector<std::string> lines(static_cast<size_t>(rows));
  parallel_for(rows, 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      for (int attempt = 0;; attempt++) {
        Rng rng = row_rng(o.seed, stream, i, attempt);
        const ordered_json row = make(rng);
        std::string line = row.dump();
        if (stream != Stream::valid && !keeps_held_out(o.seed, row, line)) continue;
        lines[static_cast<size_t>(i)] = std::move(line) + "\n";
        break;
      }
    }
  });
  AtomicFile file(path);
  for (const std::string& line : lines) file.write(line);
  file.commit();
}

}  // namespace

bool demo_pair_held_out(uint64_t seed, int a, int b) {
  if (a < 10 || a > 99 || b < 10 || b > 99) return false;
  const uint64_t low = static_cast<uint64_t>(std::min(a, b)), high = static_cast<uint64_t>(std::max(a, b));
  return philox4x32(seed, static_cast<uint64_t>(Stream::held_out) << 56, low * 100 + high)[0] % 10 == 0;
}

DemoCorpusFiles write_demo_corpus(const std::string& dir, const DemoCorpusOptions& o) {
  make_dirs(dir);
  DemoCorpusFiles files{path_join(dir, "pretrain.jsonl"), path_join(dir, "sft.jsonl"),
                        path_join(dir, "sft_valid.jsonl")};
  write_rows(files.pretrain, Stream::pretrain, o, o.pretrain_rows, [&](Rng& rng) {
    return ordered_json{{"text", pretrain_text(o.seed, rng)}};
  });
  write_rows(files.sft, Stream::sft, o, o.sft_rows, [&](Rng& rng) { return chat_row(o.seed, rng, false); });
  write_rows(files.sft_valid, Stream::valid, o, o.valid_rows, [&](Rng& rng) { return chat_row(o.seed, rng, true); });
  return files;
}

std::vector<DemoQuestion> demo_addition_questions(const DemoCorpusOptions& options, int64_t count) {
  std::vector<DemoQuestion> list;
  const auto seen = filter_of(options.seed);
  for (int64_t i = 0; i < count; i++) {
    Rng rng = row_rng(options.seed, Stream::additions, i);
    const auto [a, b] = demo::random_pair(rng, [&](int x, int y) { return !seen(x, y); });
    const bool zh = i % 2 == 0;
    list.push_back({demo::addition_question(rng, zh, a, b), std::to_string(a + b), zh});
  }
  return list;
}

std::vector<DemoQuestion> demo_two_step_questions(const DemoCorpusOptions& options, int64_t count) {
  std::vector<DemoQuestion> list;
  const auto seen = filter_of(options.seed);
  for (int64_t i = 0; i < count; i++) {
    Rng rng = row_rng(options.seed, Stream::two_steps, i);
    const auto [a, b] = demo::random_pair(rng, [&](int x, int y) { return !seen(x, y); });
    const Qa qa = demo::two_step_qa(rng, i % 2 == 0, a, b, seen, true);
    list.push_back({qa.question, std::to_string(*demo_last_number(qa.answer)), i % 2 == 0});
  }
  return list;
}

std::vector<DemoQuestion> demo_fact_questions(const DemoCorpusOptions& options, int64_t count) {
  std::vector<DemoQuestion> list;
  for (int64_t i = 0; i < count; i++) {
    Rng rng = row_rng(options.seed, Stream::facts, i);
    const demo::FactRef ref = demo::random_fact(rng, i % 2 == 0, true);
    list.push_back({demo::fact_qa(rng, ref, false).question, demo::fact_object(ref), ref.zh});
  }
  return list;
}

std::optional<int64_t> demo_last_number(std::string_view reply) {
  size_t end = reply.size();
  const auto digit = [&](size_t i) { return reply[i] >= '0' && reply[i] <= '9'; };
  while (end > 0 && !digit(end - 1)) end--;
  if (end == 0) return std::nullopt;
  size_t begin = end;
  while (begin > 0 && digit(begin - 1) && end - begin < 18) begin--;
  return std::stoll(std::string(reply.substr(begin, end - begin)));
}

const std::string& demo_calculator_tools() {
  static const std::string tools = ordered_json::array({{{"type", "function"},
                                                         {"function",
                                                          {{"name", "calculate"},
                                                           {"description", "Evaluate an arithmetic expression"},
                                                           {"parameters",
                                                            {{"type", "object"},
                                                             {"properties", {{"expression", {{"type", "string"}}}}},
                                                             {"required", ordered_json::array({"expression"})}}}}}}})
                                       .dump();
  return tools;
}

}  // namespace mm
