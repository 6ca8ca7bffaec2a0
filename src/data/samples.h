// One row of a MiniMind data set: from a JSON line to messages, and from messages to ids with a loss mask.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/json.h"
#include "text/tokenizer.h"

namespace mm {

// pretrain    {"text": str}
// chat        {"conversations": [{"role", "content"[, "reasoning_content"][, "tools"][, "tool_calls"]}, ...]}
// preference  {"chosen": [messages], "rejected": [messages]}
// prompt      {"conversations": [messages, the last an assistant's to be filled in], "answer" or "gt": str}
enum class SampleKind { pretrain, chat, preference, prompt };
const char* kind_name(SampleKind kind);

// By the fields of the first row that is a JSON object (within the first chunk). Error naming the fields found.
SampleKind detect_kind(const std::string& path);

struct SampleOptions {
  SampleKind kind = SampleKind::pretrain;
  int64_t max_len = 512;  // ids a row at most; longer rows are cut
  // MiniMind's random changes, one draw a row from (seed, file, line), whatever the threads:
  double empty_think_ratio = 0.2;  // share of rows that keep an empty "<think>\n\n</think>\n\n"; 0 = none, 1 = all
  double system_ratio = 0.2;       // share of chats without system message and tools that get one of MiniMind's ten
  uint64_t seed = 42;
  double max_bad_share = 0.01;  // a larger share of bad rows is an Error

  // The protocol of evaluation: nothing random, empty thinking removed.
  static SampleOptions evaluation(SampleKind kind, int64_t max_len);
};

// A row whose form is checked. messages as render_chat takes them (JSON strings in tools and tool_calls parsed).
struct Sample {
  SampleKind kind = SampleKind::pretrain;
  std::string text;        // pretrain
  ordered_json messages;   // chat, prompt (all of them); preference: chosen
  ordered_json rejected;   // preference
  ordered_json tools;      // chat, prompt: of the system message; null if none
  bool has_tools = false;  // any message has a "tools" field: no random system message (as MiniMind)
  std::string answer;      // prompt
};

// Parses rows; keeps buffers between calls, so one a thread.
class SampleParser {
 public:
  SampleParser();
  ~SampleParser();
  // Error (message begins with the field at fault, without file and line) for bad JSON, invalid UTF-8, missing or empty
  // fields and wrong types. Everything is checked that encode() needs.
  Sample parse(std::string_view line, SampleKind kind);
  std::optional<SampleKind> detect(
      std::string_view line);  // nothing if the line is no JSON object; Error if of no kind

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

struct TokenSequence {
  std::vector<int32_t> ids;
  std::vector<uint8_t> is_target;  // 1: this token is predicted (MiniMind's labels[t] != -100); [0] is always 0
  int64_t full_len = 0;            // ids before the row was cut to max_len
};

// Number of a row for the random draws: independent of what other rows hold.
inline uint64_t row_number(int64_t file, int64_t line) {
  return static_cast<uint64_t>(file) << 40 | static_cast<uint64_t>(line);
}

// Text and ids of samples, exactly as MiniMind's dataset classes make them. Any thread.
class SampleEncoder {
 public:
  // Error when the tokenizer lacks BOS/EOS (pretrain) or the chat markers (else).
  SampleEncoder(const Tokenizer& tokenizer, const SampleOptions& options);

  // pretrain: BOS text EOS, the text cut to max_len - 2; every token but the first (and padding ids) a target.
  // chat: the rendered template; targets follow "<|im_start|>assistant\n" up to and with "<|im_end|>\n".
  // preference: two sequences, chosen and rejected, masked like chats.
  // prompt: everything before the last message and the generation prompt, cut on the left; no targets.
  std::vector<TokenSequence> encode(const Sample& sample, uint64_t row) const;

 private:
  TokenSequence encode_chat(const std::string& text) const;

  Tokenizer tokenizer_;
  SampleOptions options_;
  std::vector<int32_t> turn_begin_, turn_end_;  // ids of the chat markers
};

// The text that encode() tokenizes: one for each sequence. Also the check that a row can be rendered, without
// tokenizer.
std::vector<std::string> render_sample(const Sample& sample, const SampleOptions& options, uint64_t row);

// The ten system messages that MiniMind adds at random.
const std::vector<std::string>& minimind_system_prompts();

}  // namespace mm
