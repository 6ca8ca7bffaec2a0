// What the kinds of answers share.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "serve/answer.h"
#include "serve/json_text.h"

namespace mm {

// Tokens of a request, summed over its prompts and choices.
class Usage {
 public:
  explicit Usage(size_t n_prompt) : counted_(n_prompt) {}
  void add(size_t prompt, const EngineEvent& last);  // the last event of a choice
  int64_t reasoning = 0;
  void append(std::string& out, bool completion) const;  // {"prompt_tokens": ...}

 private:
  std::vector<uint8_t> counted_;  // a prompt counts once, however many choices
  int64_t prompt_ = 0, cached_ = 0, generated_ = 0;
};

// {"id":...,"object":...,"created":...,"model":...,"system_fingerprint":...  without the closing brace
std::string answer_head(const ApiCall& call, const AnswerHead& head, std::string_view object);

// How many of the event's tokens are part of the answer: without the stop id that ended it.
size_t shown_tokens(const EngineEvent& event, const std::vector<int32_t>& stop_ids);

inline constexpr std::string_view kDone = "data: [DONE]\n\n";

// The end of an answer of n choices: of a stream its usage, where that was asked for, and its end mark; else the whole
// body. put(i) appends choice i to `out`.
template <class F>
void append_end(const ApiCall& call, const std::string& head, const Usage& usage, size_t n, F&& put, std::string& out) {
  if (call.stream && call.include_usage) {
    out += "data: " + head + R"(,"choices":[],"usage":)";
    usage.append(out, true);
    out += "}\n\n";
  }
  if (call.stream) {
    out += kDone;
    return;
  }
  out += head + R"(,"choices":[)";
  for (size_t i = 0; i < n; i++) {
    if (i > 0) out += ',';
    put(i);
  }
  out += R"(],"usage":)";
  usage.append(out, true);
  out += '}';
}

}  // namespace mm
