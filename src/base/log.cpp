#include "base/log.h"

#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>

#include <cstdlib>
#include <memory>

#include "base/progress.h"

namespace mm {

static spdlog::level::level_enum to_spdlog(LogLevel level) {
  switch (level) {
    case LogLevel::debug: return spdlog::level::debug;
    case LogLevel::info: return spdlog::level::info;
    case LogLevel::warn: return spdlog::level::warn;
    case LogLevel::error: return spdlog::level::err;
  }
  return spdlog::level::info;
}

static spdlog::logger& logger() {
  static const std::shared_ptr<spdlog::logger> instance = [] {
    auto l = std::make_shared<spdlog::logger>("minimind", std::make_shared<spdlog::sinks::stderr_color_sink_mt>());
    l->set_pattern("%^%L%$ %v");
    const char* env = std::getenv("MINIMIND_LOG");
    l->set_level(spdlog::level::from_str(env != nullptr ? env : "info"));
    return l;
  }();
  return *instance;
}

void set_log_level(LogLevel level) { logger().set_level(to_spdlog(level)); }

void log_line(LogLevel level, std::string_view text) {
  Progress::clear_line();
  logger().log(to_spdlog(level), "{}", text);
}

}  // namespace mm
