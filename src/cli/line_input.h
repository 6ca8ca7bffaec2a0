// Lines that a person types: with editing and history on a terminal, plain otherwise.
#pragma once

#include <string>

namespace mm {

// One at a time in a process (libedit keeps global state). While it lives on a terminal, Ctrl-C does not end the
// program.
class LineInput {
 public:
  // Loads the history from $XDG_STATE_HOME/minimind/<name> (~/.local/state without it) when standard input is a
  // terminal.
  explicit LineInput(const std::string& name);
  ~LineInput();  // saves the history; a failure to is only logged
  LineInput(const LineInput&) = delete;
  LineInput& operator=(const LineInput&) = delete;

  bool interactive() const { return interactive_; }
  // False at the end of the input (Ctrl-D). Ctrl-C on a terminal drops what was typed and gives an empty line.
  bool read(const std::string& prompt, std::string& line);

 private:
  bool interactive_;
  void (*old_interrupt_)(int) = nullptr;
  std::string history_path_;
};

}  // namespace mm
