#include "base/error.h"

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace mm {

static std::string compose(const std::string& where, const std::string& expected, const std::string& found,
                           const std::string& todo) {
  std::string s = where + ": expected " + expected + ", found " + found;
  if (!todo.empty()) s += "; " + todo;
  return s;
}

Error::Error(const std::string& where, const std::string& expected, const std::string& found, const std::string& todo)
    : std::runtime_error(compose(where, expected, found, todo)) {}

Error system_error(const std::string& what, const std::string& path) {
  return Error(fmt::format("{}: {}: {}", path, what, std::strerror(errno)));
}

namespace detail {
void check_failed(const char* file, int line, const char* condition, const std::string& message) {
  std::fprintf(stderr, "%s:%d: CHECK failed: %s %s\nThis is a bug in minimind; please report it with this line.\n",
               file, line, condition, message.c_str());
  std::abort();
}
}  // namespace detail

}  // namespace mm
