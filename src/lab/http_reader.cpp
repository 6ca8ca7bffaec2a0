#include "lab/http_reader.h"

#include <algorithm>
#include <cctype>
#include <charconv>

namespace mm {

namespace {

constexpr size_t kMaxHead = 64 << 10;

std::string lower(std::string_view s) {
  std::string out(s);
  for (char& c : out) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return out;
}

std::string_view trimmed(std::string_view s) {
  const auto space = [](char c) { return c == ' ' || c == '\t' || c == '\r'; };
  while (!s.empty() && space(s.front())) s.remove_prefix(1);
  while (!s.empty() && space(s.back())) s.remove_suffix(1);
  return s;
}

template <class T>
bool parse_number(std::string_view s, T& value, int base = 10) {
  const auto [end, error] = std::from_chars(s.data(), s.data() + s.size(), value, base);
  return error == std::errc() && end != s.data();
}

}  // namespace

void HttpReader::reset() { *this = HttpReader(); }

void HttpReader::parse_head() {
  std::string_view rest = line_;
  const std::string_view first = rest.substr(0, rest.find('\n'));
  if (first.substr(0, 7) != "HTTP/1." || first.size() < 12 || !parse_number(first.substr(9, 3), status_)) {
    state_ = State::bad;
    return;
  }
  keep_alive_ = first[7] == '1';
  length_ = Length::until_close;
  rest.remove_prefix(std::min(first.size() + 1, rest.size()));
  while (!rest.empty()) {
    const std::string_view line = rest.substr(0, rest.find('\n'));
    rest.remove_prefix(std::min(line.size() + 1, rest.size()));
    const size_t colon = line.find(':');
    if (colon == std::string_view::npos) continue;
    const std::string name = lower(line.substr(0, colon)), value = lower(trimmed(line.substr(colon + 1)));
    if (name == "content-length" && length_ != Length::chunked) {
      length_ = Length::counted;
      if (!parse_number(std::string_view(value), left_)) state_ = State::bad;
    }
    if (name == "transfer-encoding" && value.find("chunked") != std::string::npos) length_ = Length::chunked;
    if (name == "connection" && value.find("close") != std::string::npos) keep_alive_ = false;
    if (name == "content-type") event_stream_ = value.find("text/event-stream") != std::string::npos;
    if (int64_t seconds = 0; name == "retry-after" && parse_number(std::string_view(value), seconds))
      retry_after_ = static_cast<double>(seconds);
  }
  if (state_ == State::bad) return;
  if (status_ == 204 || status_ == 304) length_ = Length::counted, left_ = 0;
  if (length_ == Length::until_close) keep_alive_ = false;
  state_ = length_ == Length::counted && left_ == 0 ? State::done : State::body;
  if (status_ >= 100 && status_ < 200) {  // interim: the real head follows
    line_.clear();
    reset();
  }
}

HttpReader::State HttpReader::feed(std::string_view bytes, std::string& body) {
  while (!bytes.empty()) {
    if (state_ == State::done) state_ = State::bad;
    if (state_ == State::bad) break;
    if (state_ == State::head || (length_ == Length::chunked && chunk_ != Chunk::data)) {  // forms made of lines
      const size_t end = bytes.find('\n');
      line_.append(bytes.substr(0, end == std::string_view::npos ? bytes.size() : end + 1));
      bytes.remove_prefix(end == std::string_view::npos ? bytes.size() : end + 1);
      if (line_.size() > kMaxHead) state_ = State::bad;
      if (end == std::string_view::npos) continue;
      if (state_ == State::head) {
        if (line_.ends_with("\n\r\n") || line_.ends_with("\n\n")) {
          parse_head();
          line_.clear();
        }
        continue;
      }
      const std::string_view line = trimmed(std::string_view(line_).substr(0, line_.size() - 1));
      if (chunk_ == Chunk::size) {
        if (!parse_number(line, left_, 16)) state_ = State::bad;
        chunk_ = left_ == 0 ? Chunk::trailer : Chunk::data;
      } else if (chunk_ == Chunk::data_end) {
        if (!line.empty()) state_ = State::bad;
        chunk_ = Chunk::size;
      } else if (line.empty()) {
        state_ = State::done;
      }
      line_.clear();
      continue;
    }
    const size_t n = length_ == Length::until_close ? bytes.size() : std::min<uint64_t>(bytes.size(), left_);
    body.append(bytes.substr(0, n));
    bytes.remove_prefix(n);
    if (length_ == Length::until_close) continue;
    left_ -= n;
    if (left_ > 0) continue;
    if (length_ == Length::counted) state_ = State::done;
    else chunk_ = Chunk::data_end;
  }
  return state_;
}

HttpReader::State HttpReader::closed() {
  if (state_ == State::body && length_ == Length::until_close) state_ = State::done;
  return state_;
}

namespace {

// One pass over JSON text that looks at the members below and skips the rest, without building anything: a tenth of
// what a document tree costs, and events are all that the load generator computes on.
class AnswerScanner {
 public:
  AnswerScanner(std::string_view text, AnswerFacts& facts) : at_(text.data()), end_(at_ + text.size()), facts_(facts) {}
  bool run() {
    if (!value(In::root, 0)) return false;
    space();
    return at_ == end_;
  }

 private:
  // Where a value stands: what is known about it from the keys above.
  enum class In {
    other,
    root,
    choices,
    choice,
    delta,
    text,
    tools,
    finish,
    usage,
    details,
    prompt,
    completion,
    cached,
    error
  };

  static In child(In in, std::string_view key) {
    if (in == In::root) {
      if (key == "choices") return In::choices;
      if (key == "usage") return In::usage;
      if (key == "error") return In::error;
    } else if (in == In::choice) {
      if (key == "delta" || key == "message") return In::delta;
      if (key == "text") return In::text;
      if (key == "finish_reason") return In::finish;
    } else if (in == In::delta) {
      if (key == "content" || key == "reasoning_content" || key == "reasoning") return In::text;
      if (key == "tool_calls") return In::tools;
    } else if (in == In::usage) {
      if (key == "prompt_tokens") return In::prompt;
      if (key == "completion_tokens") return In::completion;
      if (key == "prompt_tokens_details") return In::details;
    } else if (in == In::details && key == "cached_tokens") {
      return In::cached;
    }
    return In::other;
  }

  void space() {
    while (at_ < end_ && (*at_ == ' ' || *at_ == '\n' || *at_ == '\t' || *at_ == '\r')) at_++;
  }
  bool take(char c) {
    space();
    if (at_ == end_ || *at_ != c) return false;
    at_++;
    return true;
  }
  bool string(std::string_view& s) {
    if (!take('"')) return false;
    const char* begin = at_;
    for (; at_ < end_ && *at_ != '"'; at_++) {
      if (static_cast<unsigned char>(*at_) < 0x20) return false;
      if (*at_ == '\\' && ++at_ == end_) return false;
    }
    if (at_ == end_) return false;
    s = {begin, static_cast<size_t>(at_ - begin)};
    at_++;
    return true;
  }
  bool literal(std::string_view word) {
    if (static_cast<size_t>(end_ - at_) < word.size() || std::string_view(at_, word.size()) != word) return false;
    at_ += word.size();
    return true;
  }
  bool number(In in) {
    const char* begin = at_;
    while (at_ < end_ && (std::isdigit(static_cast<unsigned char>(*at_)) || *at_ == '-' || *at_ == '+' || *at_ == '.' ||
                          *at_ == 'e' || *at_ == 'E'))
      at_++;
    int64_t n = 0;
    if (!parse_number({begin, static_cast<size_t>(at_ - begin)}, n)) return false;
    if (in == In::prompt) facts_.prompt_tokens = n;
    if (in == In::completion) facts_.completion_tokens = n;
    if (in == In::cached) facts_.cached_tokens = n;
    return true;
  }
  bool object(In in, int depth) {
    at_++;
    if (take('}')) return true;
    do {
      std::string_view key;
      if (!string(key) || !take(':') || !value(child(in, key), depth + 1)) return false;
    } while (take(','));
    return take('}');
  }
  bool array(In in, int depth) {
    at_++;
    if (take(']')) return true;
    if (in == In::tools) facts_.has_text = true;
    do {
      if (!value(in == In::choices ? In::choice : In::other, depth + 1)) return false;
    } while (take(','));
    return take(']');
  }
  bool value(In in, int depth) {
    space();
    if (at_ == end_ || depth > 64) return false;
    if (in == In::error && *at_ != 'n') facts_.error = true;
    switch (*at_) {
      case '{': return object(in, depth);
      case '[': return array(in, depth);
      case '"': {
        std::string_view s;
        if (!string(s)) return false;
        if (in == In::text && !s.empty()) facts_.has_text = true;
        if (in == In::finish) facts_.has_finish = true, facts_.by_length = s == "length";
        return true;
      }
      case 't': return literal("true");
      case 'f': return literal("false");
      case 'n': return literal("null");
      default: return number(in);
    }
  }

  const char* at_;
  const char* end_;
  AnswerFacts& facts_;
};

}  // namespace

bool read_answer(std::string_view text, AnswerFacts& facts) { return AnswerScanner(text, facts).run(); }

}  // namespace mm
