// What a load generator reads: an HTTP/1.1 response as its bytes arrive, the events of a stream, and the few facts of
// an OpenAI answer that count. All of it works over any cuts of the bytes and never throws on what a server sends.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace mm {

// One response at a time: reset() before each.
class HttpReader {
 public:
  enum class State { head, body, done, bad };
  void reset();
  // Takes the next bytes and appends what belongs to the body. Bytes past the end of the response make it bad.
  State feed(std::string_view bytes, std::string& body);
  // The connection has ended: a body without a length is complete, any other state stays what it is.
  State closed();
  State state() const { return state_; }
  int status() const { return status_; }           // 0 before the head is complete
  bool keep_alive() const { return keep_alive_; }  // may the connection be used again?
  bool event_stream() const { return event_stream_; }
  double retry_after() const { return retry_after_; }  // seconds, 0: not said

 private:
  void parse_head();
  enum class Length { none, counted, chunked, until_close };
  enum class Chunk { size, data, data_end, trailer };
  State state_ = State::head;
  Length length_ = Length::none;
  Chunk chunk_ = Chunk::size;
  int status_ = 0;
  bool keep_alive_ = true, event_stream_ = false;
  double retry_after_ = 0;
  uint64_t left_ = 0;  // of the body or the chunk
  std::string line_;   // the head, or a line of the chunked form, so far
};

// Server-sent events: calls f(data) for every event that has data.
class SseReader {
 public:
  void reset() { line_.clear(), data_.clear(), has_data_ = false, after_cr_ = false; }
  template <class F>
  void feed(std::string_view bytes, F&& f) {
    while (!bytes.empty()) {
      if (after_cr_ && bytes[0] == '\n') bytes.remove_prefix(1);
      after_cr_ = false;
      const size_t end = bytes.find_first_of("\r\n");
      if (end == std::string_view::npos) {
        line_.append(bytes);
        return;
      }
      after_cr_ = bytes[end] == '\r';
      if (line_.empty()) {
        take_line(bytes.substr(0, end), f);
      } else {
        line_.append(bytes.substr(0, end));
        take_line(line_, f);
        line_.clear();
      }
      bytes.remove_prefix(end + 1);
    }
  }

 private:
  template <class F>
  void take_line(std::string_view line, F&& f) {
    if (line.empty()) {
      if (has_data_) f(std::string_view(data_));
      data_.clear();
      has_data_ = false;
      return;
    }
    if (line.substr(0, 5) != "data:") return;  // a comment, an event's name, an id
    line.remove_prefix(5);
    if (!line.empty() && line[0] == ' ') line.remove_prefix(1);
    if (has_data_) data_ += '\n';
    data_ += line;
    has_data_ = true;
  }
  std::string line_, data_;
  bool has_data_ = false, after_cr_ = false;
};

// What one JSON object of an answer says: a chunk of a stream or a whole answer, of chats or completions.
struct AnswerFacts {
  bool has_text = false;    // any choice's text, content, reasoning_content or tool_calls is not empty
  bool has_finish = false;  // a finish_reason that is a string
  bool by_length = false;   // ... "length"
  bool error = false;       // an "error" member that is not null
  int64_t prompt_tokens = -1, completion_tokens = -1, cached_tokens = -1;
};
// False if `text` is not one JSON value. Facts found before are kept: several chunks may be read into one.
bool read_answer(std::string_view text, AnswerFacts& facts);

}  // namespace mm
