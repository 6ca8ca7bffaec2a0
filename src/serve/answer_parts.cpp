#include "serve/answer_parts.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <iterator>

#include "serve/fields.h"

namespace mm {

void Usage::add(size_t prompt, const EngineEvent& last) {
  generated_ += last.completion_tokens;
  if (counted_[prompt] != 0) return;
  counted_[prompt] = 1;
  prompt_ += last.prompt_tokens;
  cached_ += last.cached_tokens;
}

void Usage::append(std::string& out, bool completion) const {
  if (!completion) {
    fmt::format_to(std::back_inserter(out), R"({{"prompt_tokens":{0},"total_tokens":{0}}})", prompt_);
    return;
  }
  fmt::format_to(
      std::back_inserter(out),
      R"({{"prompt_tokens":{},"completion_tokens":{},"total_tokens":{},)"
      R"("prompt_tokens_details":{{"cached_tokens":{}}},"completion_tokens_details":{{"reasoning_tokens":{}}}}})",
      prompt_, generated_, prompt_ + generated_, cached_, reasoning);
}

std::string answer_head(const ApiCall& call, const AnswerHead& head, std::string_view object) {
  std::string out = fmt::format(R"({{"id":"{}","object":"{}","created":{},"model":)", head.id, object, head.created);
  append_json_string(call.model, out);
  out += R"(,"system_fingerprint":")" + head.fingerprint + '"';
  return out;
}

size_t shown_tokens(const EngineEvent& event, const std::vector<int32_t>& stop_ids) {
  const bool stopped = event.finished && event.finish == FinishReason::stop && !event.ids.empty() &&
                       std::find(stop_ids.begin(), stop_ids.end(), event.ids.back()) != stop_ids.end();
  return event.ids.size() - (stopped ? 1 : 0);
}

void append_stream_error(const ApiError& error, std::string& out) {
  out += "data: ";
  out += error.body();
  out += "\n\n";
  out += kDone;
}

std::unique_ptr<Answer> make_answer(const ApiCall& call, const ApiContext& context, const AnswerHead& head) {
  switch (call.kind) {
    case ApiCall::Kind::chat: return make_chat_answer(call, context, head);
    case ApiCall::Kind::completion: return make_completion_answer(call, context, head);
    case ApiCall::Kind::embedding: break;
  }
  return make_embedding_answer(call, head);
}

namespace {

std::string base64(const std::vector<float>& values) {
  static constexpr char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::vector<uint8_t> bytes(values.size() * sizeof(float));
  if (!bytes.empty()) std::memcpy(bytes.data(), values.data(), bytes.size());
  std::string out;
  out.reserve(bytes.size() / 3 * 4 + 4);
  for (size_t i = 0; i < bytes.size(); i += 3) {
    const size_t n = std::min<size_t>(3, bytes.size() - i);
    uint32_t word = static_cast<uint32_t>(bytes[i]) << 16;
    if (n > 1) word |= static_cast<uint32_t>(bytes[i + 1]) << 8;
    if (n > 2) word |= bytes[i + 2];
    for (size_t k = 0; k < 4; k++) out += k <= n ? digits[word >> (18 - 6 * k) & 63] : '=';
  }
  return out;
}

class EmbeddingAnswer : public Answer {
 public:
  explicit EmbeddingAnswer(const ApiCall& call)
      : call_(call), usage_(call.requests.size()), vectors_(call.requests.size()) {}

  void event(size_t prompt, EngineEvent&& event, std::string&) override {
    if (event.finished) usage_.add(prompt, event);
    if (event.embedding.empty()) return;
    const auto d_model = static_cast<int64_t>(event.embedding.size());
    if (call_.dimensions != 0 && call_.dimensions != d_model) {
      throw invalid_value("dimensions", fmt::format("this model's embeddings have {} dimensions, but got {} instead.",
                                                    d_model, call_.dimensions));
    }
    vectors_[prompt] = std::move(event.embedding);
  }

  void finish(std::string& out) override {
    out += R"({"object":"list","data":[)";
    for (size_t i = 0; i < vectors_.size(); i++) {
      fmt::format_to(std::back_inserter(out), R"({}{{"object":"embedding","index":{},"embedding":)", i > 0 ? "," : "",
                     i);
      if (call_.base64) append_json_string(base64(vectors_[i]), out);
      else append_list(vectors_[i], out);
      out += '}';
    }
    out += R"(],"model":)";
    append_json_string(call_.model, out);
    out += R"(,"usage":)";
    usage_.append(out, false);
    out += '}';
  }

 private:
  static void append_list(const std::vector<float>& values, std::string& out) {
    out += '[';
    for (size_t i = 0; i < values.size(); i++) {
      if (i > 0) out += ',';
      append_json_number(values[i], out);
    }
    out += ']';
  }

  const ApiCall& call_;
  Usage usage_;
  std::vector<std::vector<float>> vectors_;
};

}  // namespace

std::unique_ptr<Answer> make_embedding_answer(const ApiCall& call, const AnswerHead&) {
  return std::make_unique<EmbeddingAnswer>(call);
}

}  // namespace mm
