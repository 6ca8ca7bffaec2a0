#include <fmt/format.h>

#include <iterator>

#include "engine/think_splitter.h"
#include "serve/answer_parts.h"
#include "serve/tool_stream.h"

namespace mm {

namespace {

// Log-probabilities of an event's tokens: the items of "content".
void append_logprobs(const EngineEvent& event, size_t n, const Tokenizer& tokenizer, std::string& out) {
  const auto token = [&](int32_t id, float logprob) {
    const std::string_view bytes = tokenizer.token_bytes(id);
    out += R"({"token":)";
    append_json_string(bytes, out);
    out += R"(,"logprob":)";
    append_json_number(logprob, out);
    out += R"(,"bytes":[)";
    for (size_t i = 0; i < bytes.size(); i++)
      fmt::format_to(std::back_inserter(out), "{}{}", i > 0 ? "," : "", static_cast<unsigned char>(bytes[i]));
    out += ']';
  };
  for (size_t i = 0; i < n && i < event.logprobs.size(); i++) {
    if (!out.empty() && out.back() == '}') out += ',';
    token(event.ids[i], event.logprobs[i]);
    out += R"(,"top_logprobs":[)";
    for (size_t k = 0; i < event.top.size() && k < event.top[i].size(); k++) {
      if (k > 0) out += ',';
      token(event.top[i][k].id, event.top[i][k].logprob);
      out += '}';
    }
    out += "]}";
  }
}

struct ToolCall {
  std::string id, name, arguments;
};

struct Choice {
  explicit Choice(bool thinking) : splitter(thinking), in_thought(thinking) {}
  ThinkSplitter splitter;
  ToolStream tools;
  bool in_thought;  // by the tokens, for the count of reasoning tokens
  bool started = false, called = false;
  // Not streaming: the message
  std::string reasoning, content, logprobs;
  std::vector<ToolCall> calls;
  const char* finish = nullptr;
};

class ChatAnswer : public Answer {
 public:
  ChatAnswer(const ApiCall& call, const ApiContext& context, const AnswerHead& head)
      : call_(call),
        context_(context),
        id_(head.id),
        head_(answer_head(call, head, call.stream ? "chat.completion.chunk" : "chat.completion")),
        usage_(call.requests.size()),
        choices_(static_cast<size_t>(call.n), Choice(call.thinking)) {}

  void event(size_t prompt, EngineEvent&& event, std::string& out) override {
    const auto index = static_cast<size_t>(event.choice);
    Choice& choice = choices_.at(index);
    count_reasoning(choice, event.ids);
    if (call_.logprobs)
      append_logprobs(event, shown_tokens(event, call_.requests[0].stop_ids), context_.tokenizer, choice.logprobs);
    if (call_.split_think) {
      for (const auto& part : choice.splitter.push(event.text)) give_text(index, part.thinking, part.text, out);
      if (event.finished)
        for (const auto& part : choice.splitter.flush()) give_text(index, part.thinking, part.text, out);
    } else {
      give_text(index, false, event.text, out);
    }
    if (event.finished) end(index, prompt, event, out);
    // Tokens whose text is held back have log-probabilities all the same.
    if (call_.stream && !choice.logprobs.empty()) chunk(index, R"("content":"")", nullptr, out);
  }

  void finish(std::string& out) override {
    append_end(
        call_, head_, usage_, choices_.size(), [&](size_t i) { whole_choice(i, out); }, out);
  }

 private:
  void count_reasoning(Choice& choice, const std::vector<int32_t>& ids) {
    if (!call_.split_think) return;
    for (const int32_t id : ids) {
      if (id == context_.think_open) choice.in_thought = true;
      if (choice.in_thought) usage_.reasoning++;
      if (id == context_.think_close) choice.in_thought = false;
    }
  }

  void give_text(size_t index, bool thinking, std::string_view text, std::string& out) {
    Choice& choice = choices_[index];
    if (text.empty()) return;
    if (thinking) {
      field(index, "reasoning_content", text, choice.reasoning, out);
    } else if (!call_.tools) {
      field(index, "content", text, choice.content, out);
    } else {
      parts_.clear();
      choice.tools.push(text, parts_);
      give(index, out);
    }
  }

  void field(size_t index, std::string_view name, std::string_view text, std::string& whole, std::string& out) {
    if (!call_.stream) {
      whole += text;
      return;
    }
    scratch_ = '"';
    scratch_ += name;
    scratch_ += R"(":")";
    append_json_escaped(text, scratch_);
    scratch_ += '"';
    chunk(index, scratch_, nullptr, out);
  }

  void give(size_t index, std::string& out) {  // parts_
    Choice& choice = choices_[index];
    for (const auto& part : parts_) {
      switch (part.kind) {
        case ToolStream::Part::Kind::content:  // of a forced call: its own markup, cut
          if (!call_.forced_call) field(index, "content", part.text, choice.content, out);
          break;
        case ToolStream::Part::Kind::call:
          choice.called = true;
          choice.calls.push_back({call_id(index, choice.calls.size()), part.text, ""});
          if (call_.stream) {
            scratch_ = R"("tool_calls":[)";
            append_call(choice.calls.size() - 1, choice.calls.back(), true, scratch_);
            scratch_ += ']';
            chunk(index, scratch_, nullptr, out);
          }
          break;
        case ToolStream::Part::Kind::arguments:
          if (!call_.stream) {
            choice.calls.back().arguments += part.text;
            break;
          }
          scratch_ = fmt::format(R"("tool_calls":[{{"index":{},"function":{{"arguments":")", choice.calls.size() - 1);
          append_json_escaped(part.text, scratch_);
          scratch_ += R"("}}])";
          chunk(index, scratch_, nullptr, out);
          break;
      }
    }
  }

  std::string call_id(size_t index, size_t k) const {
    return fmt::format("call_{}{}_{}", id_.substr(id_.find('-') + 1), index, k);
  }

  static void append_call(size_t k, const ToolCall& call, bool with_index, std::string& out) {
    out += '{';
    if (with_index) fmt::format_to(std::back_inserter(out), R"("index":{},)", k);
    out += R"("id":")" + call.id + R"(","type":"function","function":{"name":)";
    append_json_string(call.name, out);
    out += R"(,"arguments":)";
    append_json_string(call.arguments, out);
    out += "}}";
  }

  void end(size_t index, size_t prompt, const EngineEvent& event, std::string& out) {
    Choice& choice = choices_[index];
    if (call_.tools) {
      parts_.clear();
      choice.tools.flush(parts_, event.finish == FinishReason::length || call_.forced_call);
      give(index, out);
    }
    usage_.add(prompt, event);
    choice.finish = event.finish == FinishReason::length ? "length" : choice.called ? "tool_calls" : "stop";
    if (call_.stream) chunk(index, "", choice.finish, out);
  }

  // One event; takes the log-probabilities that wait.
  void chunk(size_t index, std::string_view delta, const char* finish, std::string& out) {
    Choice& choice = choices_[index];
    out += "data: ";
    out += head_;
    fmt::format_to(std::back_inserter(out), R"(,"choices":[{{"index":{},"delta":{{)", index);
    if (!choice.started) {
      out += delta.starts_with(R"("content")") ? R"("role":"assistant",)" : R"("role":"assistant","content":null,)";
      if (delta.empty()) out.pop_back();
    }
    choice.started = true;
    out += delta;
    out += R"(},"logprobs":)";
    if (choice.logprobs.empty()) {
      out += "null";
    } else {
      out += R"({"content":[)" + choice.logprobs + R"(],"refusal":null})";
      choice.logprobs.clear();
    }
    out += R"(,"finish_reason":)";
    if (finish == nullptr) out += "null";
    else fmt::format_to(std::back_inserter(out), R"("{}")", finish);
    out += call_.include_usage ? R"(}],"usage":null})" : "}]}";
    out += "\n\n";
  }

  void whole_choice(size_t index, std::string& out) const {
    const Choice& choice = choices_[index];
    fmt::format_to(std::back_inserter(out), R"({{"index":{},"message":{{"role":"assistant","content":)", index);
    if (choice.content.empty() && (choice.called || call_.forced_call)) out += "null";
    else append_json_string(choice.content, out);
    out += R"(,"refusal":null)";
    if (!choice.reasoning.empty()) {
      out += R"(,"reasoning_content":)";
      append_json_string(choice.reasoning, out);
    }
    if (choice.called) {
      out += R"(,"tool_calls":[)";
      for (size_t k = 0; k < choice.calls.size(); k++) {
        if (k > 0) out += ',';
        append_call(k, choice.calls[k], false, out);
      }
      out += ']';
    }
    out += R"(},"logprobs":)";
    if (call_.logprobs) out += R"({"content":[)" + choice.logprobs + R"(],"refusal":null})";
    else out += "null";
    fmt::format_to(std::back_inserter(out), R"(,"finish_reason":"{}"}})", choice.finish);
  }

  const ApiCall& call_;
  const ApiContext& context_;
  std::string id_, head_, scratch_;
  Usage usage_;
  std::vector<Choice> choices_;
  std::vector<ToolStream::Part> parts_;
};

}  // namespace

std::unique_ptr<Answer> make_chat_answer(const ApiCall& call, const ApiContext& context, const AnswerHead& head) {
  return std::make_unique<ChatAnswer>(call, context, head);
}

}  // namespace mm
