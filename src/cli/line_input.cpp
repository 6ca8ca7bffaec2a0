#include "cli/line_input.h"

#include <editline/readline.h>
#include <langinfo.h>
#include <unistd.h>

#include <cerrno>
#include <clocale>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <iostream>

#include "base/error.h"
#include "base/fs.h"
#include "base/interrupt.h"
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
  // While it lives Ctrl-C never ends the program: it ends a read, or what an InterruptGuard guards.
  old_interrupt_ = std::signal(SIGINT, SIG_IGN);
  rl_readline_name = "minimind";
  rl_inhibit_completion = 1;
  using_history();
  stifle_history(1000);
  history_path_ = state_file(name);
  if (!history_path_.empty() && file_exists(history_path_)) read_history(history_path_.c_str());
}

LineInput::~LineInput() {
  if (!interactive_) return;
  std::signal(SIGINT, old_interrupt_);
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
  char* typed = nullptr;
  int error = 0;
  {
    const InterruptibleRead interruptible;
    errno = 0;
    typed = readline(prompt.c_str());
    error = errno;
  }
  if (typed == nullptr) {
    if (error != EINTR) return false;
    std::fputc('\n', stderr);
    return true;
  }
  line = typed;
  std::free(typed);
  if (!line.empty()) add_history(line.c_str());
  return true;
}

}  // namespace mm
