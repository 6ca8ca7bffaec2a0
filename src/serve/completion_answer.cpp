#include <fmt/format.h>

#include <iterator>

#include "serve/answer_parts.h"

namespace mm {

namespace {

// A token as the legacy API names it: its text, or its bytes where they are no whole characters.
std::string token_name(std::string_view bytes) {
  if (to_utf8(bytes) == bytes) return std::string(bytes);
  std::string out = "bytes:";
  for (const char c : bytes) fmt::format_to(std::back_inserter(out), "\\x{:02x}", static_cast<unsigned char>(c));
  return out;
}

// {"tokens": [...], "token_logprobs": [...], "top_logprobs": [...], "text_offset": [...]}
struct LegacyLogprobs {
  std::string tokens, values, top, offsets;
  int64_t offset = 0;  // characters of the answer so far

  bool empty() const { return tokens.empty(); }

  void add(const EngineEvent& event, size_t n, const Tokenizer& tokenizer) {
    for (size_t i = 0; i < n && i < event.logprobs.size(); i++) {
      const char* comma = tokens.empty() ? "" : ",";
      const std::string_view bytes = tokenizer.token_bytes(event.ids[i]);
      tokens += comma;
      append_json_string(token_name(bytes), tokens);
      values += comma;
      append_json_number(event.logprobs[i], values);
      fmt::format_to(std::back_inserter(offsets), "{}{}", comma, offset);
      for (const char c : bytes) offset += (static_cast<unsigned char>(c) & 0xC0) != 0x80 ? 1 : 0;
      top += comma;
      top += '{';
      for (size_t k = 0; i < event.top.size() && k < event.top[i].size(); k++) {
        if (k > 0) top += ',';
        append_json_string(token_name(tokenizer.token_bytes(event.top[i][k].id)), top);
        top += ':';
        append_json_number(event.top[i][k].logprob, top);
      }
      top += '}';
    }
  }

  void append(std::string& out) const {
    out += R"({"tokens":[)" + tokens + R"(],"token_logprobs":[)" + values + R"(],"top_logprobs":[)" + top +
           R"(],"text_offset":[)" + offsets + "]}";
  }

  void clear() {  // the offset stays
    for (auto* s : {&tokens, &values, &top, &offsets}) s->clear();
  }
};

struct Choice {
  std::string text;
  LegacyLogprobs logprobs;
  const char* finish = nullptr;
  bool started = false;
};

class CompletionAnswer : public Answer {
 public:
  CompletionAnswer(const ApiCall& call, const ApiContext& context, const AnswerHead& head)
      : call_(call),
        context_(context),
        head_(answer_head(call, head, "text_completion")),
        usage_(call.requests.size()),
        choices_(call.requests.size() * static_cast<size_t>(call.n)) {}

  void event(size_t prompt, EngineEvent&& event, std::string& out) override {
    const size_t index = prompt * static_cast<size_t>(call_.n) + static_cast<size_t>(event.choice);
    Choice& choice = choices_.at(index);
    std::string text;
    if (!choice.started && !call_.echo.empty()) text = call_.echo[prompt];
    choice.started = true;
    text += event.text;
    if (call_.logprobs)
      choice.logprobs.add(event, shown_tokens(event, call_.requests[prompt].stop_ids), context_.tokenizer);
    if (event.finished) {
      usage_.add(prompt, event);
      choice.finish = event.finish == FinishReason::length ? "length" : "stop";
    }
    if (!call_.stream) {
      choice.text += text;
      return;
    }
    if (text.empty() && choice.logprobs.empty() && !event.finished) return;
    out += "data: " + head_ + R"(,"choices":[)";
    append_choice(index, text, out);
    out += call_.include_usage ? R"(],"usage":null})" : "]}";
    out += "\n\n";
    choice.logprobs.clear();
  }

  void finish(std::string& out) override {
    append_end(
        call_, head_, usage_, choices_.size(), [&](size_t i) { append_choice(i, choices_[i].text, out); }, out);
  }

 private:
  void append_choice(size_t index, std::string_view text, std::string& out) const {
    const Choice& choice = choices_[index];
    fmt::format_to(std::back_inserter(out), R"({{"index":{},"text":)", index);
    append_json_string(text, out);
    out += R"(,"logprobs":)";
    if (call_.logprobs) choice.logprobs.append(out);
    else out += "null";
    out += R"(,"finish_reason":)";
    if (choice.finish == nullptr) out += "null";
    else fmt::format_to(std::back_inserter(out), R"("{}")", choice.finish);
    out += '}';
  }

  const ApiCall& call_;
  const ApiContext& context_;
  std::string head_;
  Usage usage_;
  std::vector<Choice> choices_;
};

}  // namespace

std::unique_ptr<Answer> make_completion_answer(const ApiCall& call, const ApiContext& context, const AnswerHead& head) {
  return std::make_unique<CompletionAnswer>(call, context, head);
}

}  // namespace mm
