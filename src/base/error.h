// Bad input from outside is an Error; a broken invariant of our own is a CHECK.
//
// An Error says four things in one line: what was expected, what was found, where, and what to do.
// The commands catch it at the top, print that line and exit with code 2; a server answers with it.
#pragma once

#include <fmt/format.h>

#include <stdexcept>
#include <string>
#include <utility>

namespace mm {

class Error : public std::runtime_error {
 public:
  // `where` names a file, line, flag, tensor or field. `todo` may be empty where nothing helps.
  Error(const std::string& where, const std::string& expected, const std::string& found, const std::string& todo = "");
  // A message that does not split into expected and found (system failures).
  explicit Error(const std::string& message) : std::runtime_error(message) {}
};

// Error about a file operation: message carries the path and strerror(errno).
[[nodiscard]] Error system_error(const std::string& what, const std::string& path);

namespace detail {
[[noreturn]] void check_failed(const char* file, int line, const char* condition, const std::string& message);
}

// Stops the program (abort) when our own invariant is broken. Never used on data from outside.
#define MM_CHECK(cond, ...)                                                                 \
  do {                                                                                      \
    if (!(cond)) [[unlikely]]                                                               \
      ::mm::detail::check_failed(__FILE__, __LINE__, #cond, ::fmt::format("" __VA_ARGS__)); \
  } while (0)

}  // namespace mm
