#include "engine/chat_session.h"

#include "base/error.h"
#include "text/chat_template.h"

namespace mm {

static std::string_view strip_newlines(std::string_view s) {
  while (s.starts_with('\n')) s.remove_prefix(1);
  while (s.ends_with('\n')) s.remove_suffix(1);
  return s;
}

AnswerParts split_answer(std::string_view generated, bool open_thinking) {
  static constexpr std::string_view open = "<think>", close = "</think>";
  const size_t end = generated.find(close);
  if (end == std::string_view::npos) {
    if (open_thinking) return {std::string(strip_newlines(generated)), ""};
    return {"", std::string(generated)};
  }
  std::string_view reasoning = generated.substr(0, end);
  if (const size_t at = reasoning.rfind(open); at != std::string_view::npos) reasoning.remove_prefix(at + open.size());
  std::string_view content = generated.substr(generated.rfind(close) + close.size());
  while (content.starts_with('\n')) content.remove_prefix(1);
  return {std::string(strip_newlines(reasoning)), std::string(content)};
}

static bool has_system(const ordered_json& messages) { return !messages.empty() && messages[0]["role"] == "system"; }

void ChatSession::set_system(const std::string& text) {
  if (has_system(messages_)) messages_.erase(0);
  if (!text.empty()) messages_.insert(messages_.begin(), ordered_json{{"role", "system"}, {"content", text}});
}

void ChatSession::reset() {
  const size_t keep = has_system(messages_) ? 1 : 0;
  messages_.erase(messages_.begin() + static_cast<std::ptrdiff_t>(keep), messages_.end());
}

void ChatSession::add_user(const std::string& text) { messages_.push_back({{"role", "user"}, {"content", text}}); }

std::string chat_prompt(const ordered_json& messages, bool open_thinking, bool keep_empty_think) {
  std::string text = render_chat(messages, nullptr, {.add_generation_prompt = true, .open_thinking = open_thinking});
  if (keep_empty_think) return text;
  static constexpr std::string_view empty = "<think>\n\n</think>\n\n";
  for (size_t at = 0; (at = text.find(empty, at)) != std::string::npos;) text.erase(at, empty.size());
  return text;
}

std::vector<int32_t> ChatSession::render(const ordered_json& messages) const {
  return tokenizer_.encode(chat_prompt(messages, open_thinking_, keep_empty_think_));
}

std::vector<int32_t> ChatSession::prompt(int64_t max_tokens, int* dropped) {
  MM_CHECK(!messages_.empty() && messages_.back()["role"] == "user");
  *dropped = 0;
  ordered_json kept = messages_;
  std::vector<int32_t> ids = render(kept);
  while (static_cast<int64_t>(ids.size()) > max_tokens) {
    const size_t first = has_system(kept) ? 1 : 0;
    size_t next = first + 1;
    while (next < kept.size() && kept[next]["role"] != "user") next++;
    if (next >= kept.size()) {
      take_back_user();
      throw Error("message", fmt::format("at most {} tokens with the system message", max_tokens),
                  fmt::format("{}", ids.size()), "shorten it, or ask for fewer new tokens");
    }
    kept.erase(kept.begin() + static_cast<std::ptrdiff_t>(first), kept.begin() + static_cast<std::ptrdiff_t>(next));
    ids = render(kept);
    ++*dropped;
  }
  messages_ = std::move(kept);
  return ids;
}

void ChatSession::add_answer(std::string_view generated) {
  const auto [reasoning, content] = split_answer(generated, open_thinking_);
  ordered_json message{{"role", "assistant"}, {"content", content}};
  if (!reasoning.empty()) message["reasoning_content"] = reasoning;
  messages_.push_back(message);
}

void ChatSession::take_back_user() {
  MM_CHECK(!messages_.empty() && messages_.back()["role"] == "user");
  messages_.erase(messages_.size() - 1);
}

}  // namespace mm
