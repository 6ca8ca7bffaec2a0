#include "cli/line_input.h"

#include <editline/readline.h>
#include <langinfo.h>
#include <unistd.h>

#include <cerrno>
#include <clocale>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <iostream>

#include "base/error.h"
#include "base/fs.h"
#include "base/log.h"

namespace mm {

static std::string state_file(const std::string& name) {
  if (const char* dir = std::getenv("XDG_STATE_HOME"); dir != nullptr && dir[0] == '/') {
    return path_join(path_join(dir, "minimind"), name);
  }
  const char* home = std::getenv("HOME");
  if (home == nullptr || home[0] == '\0') return "";
  return path_join(path_join(home, ".local/state/minimind"), name);
}

LineInput::LineInput(const std::string& name) : interactive_(isatty(STDIN_FILENO) != 0) {
  if (!interactive_) return;
  // libedit counts columns in the locale's encoding; the C locale would break every character outside ASCII.
  if (std::setlocale(LC_CTYPE, "") == nullptr || std::strcmp(nl_langinfo(CODESET), "UTF-8") != 0) {
    std::setlocale(LC_CTYPE, "C.UTF-8");
  }
  // Without SA_RESTART the signal ends libedit's read, and with it the line.
  struct sigaction action {};
  action.sa_handler = [](int) {};
  sigaction(SIGINT, &action, &old_interrupt_);
  rl_readline_name = "minimind";
  rl_inhibit_completion = 1;
  using_history();
  stifle_history(1000);
  history_path_ = state_file(name);
  if (!history_path_.empty() && file_exists(history_path_)) read_history(history_path_.c_str());
}

LineInput::~LineInput() {
  if (!interactive_) return;
  sigaction(SIGINT, &old_interrupt_, nullptr);
  if (history_path_.empty()) return;
  try {
    make_dirs(std::filesystem::path(history_path_).parent_path().string());
    if (const int e = write_history(history_path_.c_str()); e != 0) throw system_error("cannot write", history_path_);
  } catch (const std::exception& e) {
    log_warn("the input history was not saved: {}", e.what());
  }
}

bool LineInput::read(const std::string& prompt, std::string& line) {
  line.clear();
  if (!interactive_) return static_cast<bool>(std::getline(std::cin, line));
  errno = 0;
  char* typed = readline(prompt.c_str());
  if (typed == nullptr) {
    if (errno != EINTR) return false;
    std::fputc('\n', stderr);
    return true;
  }
  line = typed;
  std::free(typed);
  if (!line.empty()) add_history(line.c_str());
  return true;
}

}  // namespace mm
