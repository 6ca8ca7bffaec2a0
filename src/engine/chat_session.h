// A conversation in the terminal: its messages, and the prompt for the next answer.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/json.h"
#include "text/tokenizer.h"

namespace mm {

// Not thread safe.
class ChatSession {
 public:
  // keep_empty_think: false removes the template's "<think>\n\n</think>\n\n" wherever it is empty, for models that were
  // trained without it.
  explicit ChatSession(Tokenizer tokenizer, bool keep_empty_think = true)
      : tokenizer_(std::move(tokenizer)), keep_empty_think_(keep_empty_think) {}

  void set_system(const std::string& text);  // "" removes it; turns stay
  void set_open_thinking(bool on) { open_thinking_ = on; }
  bool open_thinking() const { return open_thinking_; }
  void reset();  // forgets the turns, keeps the system message

  void add_user(const std::string& text);
  // Ids of the rendered conversation up to where the answer to the last user message begins. While they are more than
  // max_tokens the oldest turn is forgotten (a user message and what follows it, never the system message or the last
  // turn); *dropped counts the forgotten turns. Error when the last turn alone is too long; then it is taken back and
  // nothing is forgotten.
  std::vector<int32_t> prompt(int64_t max_tokens, int* dropped);
  // `generated` is the model's text for that prompt; what lies before </think> becomes reasoning_content.
  void add_answer(std::string_view generated);
  void take_back_user();  // after a failed answer

  // [{role, content[, reasoning_content]}], the system message first where there is one.
  const ordered_json& messages() const { return messages_; }

 private:
  std::vector<int32_t> render(const ordered_json& messages) const;

  Tokenizer tokenizer_;
  bool keep_empty_think_;
  ordered_json messages_ = ordered_json::array();
  bool open_thinking_ = false;
};

// The rendered conversation up to where the next answer begins.
std::string chat_prompt(const ordered_json& messages, bool open_thinking, bool keep_empty_think);

struct AnswerParts {
  std::string reasoning, content;
};
// Splits generated text as the chat template does when it reads it back. open_thinking: the prompt ended inside
// <think>, so text without </think> is all reasoning.
AnswerParts split_answer(std::string_view generated, bool open_thinking);

}  // namespace mm
