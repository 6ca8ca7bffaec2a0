#include "serve/tool_stream.h"

#include "base/error.h"
#include "base/json.h"
#include "engine/stop_matcher.h"

namespace mm {

static constexpr std::string_view kOpen = "<tool_call>", kClose = "</tool_call>", kSpace = " \t\r\n";

namespace {

// Reads the head of a call in the usual form. Every function: false when the text does not go on so; `*cut` where it
// merely ends too early to tell.
struct HeadReader {
  std::string_view text;
  size_t at = 0;
  bool cut = false;

  bool space() {
    while (at < text.size() && kSpace.find(text[at]) != std::string_view::npos) at++;
    cut = at == text.size();
    return true;
  }
  bool word(std::string_view w) {
    space();
    const std::string_view rest = text.substr(at, w.size());
    if (rest == w) {
      at += w.size();
      return true;
    }
    cut = w.starts_with(rest);
    return false;
  }
  bool string(std::string& value) {
    if (!word("\"")) return false;
    const size_t begin = at - 1;
    for (; at < text.size(); at++) {
      if (text[at] == '\\') at++;
      else if (text[at] == '"') {
        at++;
        const auto parsed = ordered_json::parse(text.substr(begin, at - begin), nullptr, false);
        if (!parsed.is_string()) return false;
        value = parsed.get<std::string>();
        return true;
      }
    }
    cut = true;
    return false;
  }
  std::string begun_string() {  // as far as it goes
    space();
    const size_t quote = at;
    std::string value;
    if (string(value) || quote == text.size() || text[quote] != '"') return value;
    constexpr size_t longest_escape = 12;  // a pair, \ud83d\ude00; the text may end inside it
    for (size_t n = text.size() - quote, least = n - std::min(n, longest_escape); n > least; n--) {
      const auto parsed = ordered_json::parse(std::string(text.substr(quote, n)) + '"', nullptr, false);
      if (parsed.is_string()) return parsed.get<std::string>();
    }
    return value;
  }
};

}  // namespace

void ToolStream::content(std::string_view text, std::vector<Part>& parts) {
  if (text.empty()) return;
  if (!parts.empty() && parts.back().kind == Part::Kind::content) parts.back().text += text;
  else parts.push_back({Part::Kind::content, std::string(text)});
}

bool ToolStream::step_content(std::vector<Part>& parts) {
  const size_t at = held_.find(kOpen);
  const bool found = at != std::string::npos;
  // White space waits: it goes when a call follows it or came before it.
  size_t keep = found ? held_.size() - at : partial_match_at_end(held_, kOpen);
  while (keep < held_.size() && kSpace.find(held_[held_.size() - keep - 1]) != std::string_view::npos) keep++;
  const std::string_view given = std::string_view(held_).substr(0, held_.size() - keep);
  const size_t begin = after_call_ ? std::min(given.find_first_not_of(kSpace), given.size()) : 0;
  content(given.substr(begin), parts);
  if (begin < given.size()) after_call_ = false;
  held_.erase(0, found ? at + kOpen.size() : held_.size() - keep);
  if (found) state_ = State::opening;
  return found;
}

bool ToolStream::step_opening(std::vector<Part>& parts) {
  HeadReader head{held_};
  std::string name;
  const bool usual = head.word("{") && head.word("\"name\"") && head.word(":") && head.string(name) && head.word(",") &&
                     head.word("\"arguments\"") && head.word(":") && head.word("{");
  if (!usual) {
    if (!head.cut) state_ = State::buffered;
    return !head.cut;
  }
  held_.erase(0, head.at - 1);
  parts.push_back({Part::Kind::call, std::move(name)});
  n_call_++;
  depth_ = 0;
  in_string_ = escaped_ = false;
  state_ = State::arguments;
  return true;
}

bool ToolStream::step_arguments(std::vector<Part>& parts) {
  size_t n = 0;
  bool ended = false;
  while (n < held_.size() && !ended) {
    const char c = held_[n++];
    if (in_string_) {
      if (escaped_) escaped_ = false;
      else if (c == '\\') escaped_ = true;
      else if (c == '"') in_string_ = false;
    } else if (c == '"') {
      in_string_ = true;
    } else if (c == '{' || c == '[') {
      depth_++;
    } else if (c == '}' || c == ']') {
      ended = --depth_ == 0;
    }
  }
  if (n > 0) parts.push_back({Part::Kind::arguments, held_.substr(0, n)});
  held_.erase(0, n);
  if (ended) state_ = State::closing;
  return ended;
}

bool ToolStream::step_closing() {  // whatever stands between the arguments and the closing tag is of no use
  const size_t at = held_.find(kClose);
  if (at == std::string::npos) {
    held_.erase(0, held_.size() - partial_match_at_end(held_, kClose));
    return false;
  }
  held_.erase(0, at + kClose.size());
  state_ = State::content;
  after_call_ = true;
  return true;
}

bool ToolStream::step_buffered(std::vector<Part>& parts) {
  const size_t at = held_.find(kClose);
  if (at == std::string::npos) return false;
  const std::string inner = held_.substr(0, at);
  held_.erase(0, at + kClose.size());
  state_ = State::content;
  if (!whole_call(inner, parts)) content(std::string(kOpen) + inner + std::string(kClose), parts);
  return true;
}

bool ToolStream::whole_call(std::string_view inner, std::vector<Part>& parts) {
  try {
    const ordered_json call = parse_json(inner, "tool_call");
    const auto name = json_get<std::string>(call, "name", "tool_call");
    const auto it = call.find("arguments");
    std::string arguments = "{}";
    if (it != call.end() && it->is_string()) arguments = it->get<std::string>();
    else if (it != call.end() && !it->is_null()) arguments = it->dump();
    parts.push_back({Part::Kind::call, name});
    parts.push_back({Part::Kind::arguments, std::move(arguments)});
    n_call_++;
    after_call_ = true;
    return true;
  } catch (const Error&) {
    return false;
  }
}

bool ToolStream::begun_call(std::string_view inner, std::vector<Part>& parts) {
  HeadReader head{inner};
  if (!head.word("{")) return head.cut;
  if (!head.word("\"name\"")) return true;  // its name may come last
  std::string name;
  if (!head.word(":") || !head.string(name)) return head.cut;
  parts.push_back({Part::Kind::call, std::move(name)});
  n_call_++;
  if (!head.word(",") || !head.word("\"arguments\"") || !head.word(":")) return true;
  if (std::string arguments = head.begun_string(); !arguments.empty())
    parts.push_back({Part::Kind::arguments, std::move(arguments)});
  return true;
}

bool ToolStream::step(std::vector<Part>& parts) {
  switch (state_) {
    case State::content: return step_content(parts);
    case State::opening: return step_opening(parts);
    case State::arguments: return step_arguments(parts);
    case State::closing: return step_closing();
    case State::buffered: return step_buffered(parts);
  }
  return false;
}

void ToolStream::push(std::string_view text, std::vector<Part>& parts) {
  held_ += text;
  while (step(parts)) {
  }
}

void ToolStream::flush(std::vector<Part>& parts, bool unfinished) {
  const std::string rest = std::move(held_);
  held_.clear();
  switch (state_) {
    case State::content:
      if (!after_call_ || rest.find_first_not_of(kSpace) != std::string::npos) content(rest, parts);
      break;
    case State::opening:
    case State::buffered:
      if (!whole_call(rest, parts) && !(unfinished && begun_call(rest, parts)))
        content(std::string(kOpen) + rest, parts);
      break;
    case State::arguments:
    case State::closing: break;
  }
  state_ = State::content;
}

}  // namespace mm
