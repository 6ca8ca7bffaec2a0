// Log lines for people, always on standard error: standard output belongs to results.
#pragma once

#include <fmt/format.h>

#include <string_view>

namespace mm {

enum class LogLevel { debug, info, warn, error };

// Lines below this level are dropped. Default info; MINIMIND_LOG=debug|info|warn|error sets the first value.
void set_log_level(LogLevel level);
void log_line(LogLevel level, std::string_view text);  // thread safe

template <class... A>
void log_debug(fmt::format_string<A...> f, A&&... a) {
  log_line(LogLevel::debug, fmt::format(f, std::forward<A>(a)...));
}
template <class... A>
void log_info(fmt::format_string<A...> f, A&&... a) {
  log_line(LogLevel::info, fmt::format(f, std::forward<A>(a)...));
}
template <class... A>
void log_warn(fmt::format_string<A...> f, A&&... a) {
  log_line(LogLevel::warn, fmt::format(f, std::forward<A>(a)...));
}
template <class... A>
void log_error(fmt::format_string<A...> f, A&&... a) {
  log_line(LogLevel::error, fmt::format(f, std::forward<A>(a)...));
}

}  // namespace mm
