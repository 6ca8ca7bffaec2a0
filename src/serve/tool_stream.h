// Finds the tool calls in a text while it streams in:
//   <tool_call>\n{"name": "f", "arguments": {...}}\n</tool_call>
// The arguments of a call in this form are given out as they come; a call in another order or with arguments in a
// string when it is complete; what is no call after all is content, as it stands.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace mm {

class ToolStream {
 public:
  struct Part {
    enum class Kind { content, call, arguments } kind = Kind::content;
    std::string text;  // content; the name of the function of a new call; more of the arguments of the last call
  };
  // How the text is cut into pushes changes nothing about the joined parts. White space before, between and behind
  // calls is left out.
  void push(std::string_view text, std::vector<Part>& parts);
  // The text ended; a call whose closing tag alone is missing counts. unfinished: a limit cut it; then a call inside
  // which it ends is given as far as it is known, from its name on, and its markup is never content.
  void flush(std::vector<Part>& parts, bool unfinished);
  int n_call() const { return n_call_; }

 private:
  enum class State { content, opening, arguments, closing, buffered };
  bool step(std::vector<Part>& parts);  // false: more text is needed
  bool step_content(std::vector<Part>& parts);
  bool step_opening(std::vector<Part>& parts);
  bool step_arguments(std::vector<Part>& parts);
  bool step_closing();
  bool step_buffered(std::vector<Part>& parts);
  bool whole_call(std::string_view inner, std::vector<Part>& parts);  // false: it is none
  bool begun_call(std::string_view inner, std::vector<Part>& parts);  // false: it could not have become one
  void content(std::string_view text, std::vector<Part>& parts);

  State state_ = State::content;
  std::string held_;            // not yet given out
  int depth_ = 0, n_call_ = 0;  // of brackets inside the arguments
  bool in_string_ = false, escaped_ = false, after_call_ = false;
};

}  // namespace mm
