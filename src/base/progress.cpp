#include "base/progress.h"

#include <fmt/format.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>

namespace mm {

static std::atomic<bool> g_quiet{false};
static std::atomic<bool> g_line_open{false};

static bool on_terminal() {
  static const bool tty = isatty(STDERR_FILENO) != 0;
  return tty;
}

static size_t terminal_columns() {
  winsize size{};
  if (ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 20) return size.ws_col;
  return 120;
}

double now_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

std::string human_count(double n) {
  const char* suffix[] = {"", "k", "M", "G", "T"};
  int i = 0;
  while (n >= 1000 && i < 4) n /= 1000, i++;
  return i == 0 ? fmt::format("{:.0f}", n) : fmt::format("{:.{}f}{}", n, n < 10 ? 2 : n < 100 ? 1 : 0, suffix[i]);
}

std::string human_bytes(double n) {
  const char* suffix[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  int i = 0;
  while (n >= 1024 && i < 4) n /= 1024, i++;
  return fmt::format("{:.{}f} {}", n, i == 0 ? 0 : n < 10 ? 2 : n < 100 ? 1 : 0, suffix[i]);
}

std::string human_duration(double seconds) {
  const int64_t s = std::llround(std::max(0.0, seconds));
  if (s >= 3600) return fmt::format("{}:{:02}:{:02}", s / 3600, s / 60 % 60, s % 60);
  return fmt::format("{}:{:02}", s / 60, s % 60);
}

Progress::Progress(std::string title, int64_t total, std::string unit)
    : title_(std::move(title)), unit_(std::move(unit)), total_(total), start_(now_seconds()) {}

Progress::~Progress() { finish(); }

void Progress::set(int64_t done, const std::string& extra) {
  if (first_ < 0) first_ = done;
  done_ = done;
  extra_ = extra;
  draw(false);
}

void Progress::rate_units(int64_t units_done, std::string unit) {
  rate_done_ = units_done;
  rate_unit_ = std::move(unit);
}

void Progress::set_quiet(bool quiet) { g_quiet = quiet; }

void Progress::clear_line() {
  if (!g_line_open.exchange(false)) return;
  std::fputs("\r\033[K", stderr);
}

void Progress::draw(bool force) {
  if (g_quiet) return;
  const double now = now_seconds();
  if (!force && (now - start_ < 2.0 || now - last_draw_ < (on_terminal() ? 0.1 : 10.0))) return;
  last_draw_ = now;
  shown_ = true;
  const double elapsed = std::max(1e-9, now - start_);
  const double speed = static_cast<double>(done_ - std::max<int64_t>(first_, 0)) / elapsed;
  std::string line = title_ + " ";
  if (total_ > 0) {
    const double share = std::clamp(static_cast<double>(done_) / static_cast<double>(total_), 0.0, 1.0);
    const int filled = static_cast<int>(share * 20);
    line +=
        fmt::format("{:3.0f}% |{}{}| {}/{} {}", share * 100, std::string(filled, '#'), std::string(20 - filled, ' '),
                    human_count(static_cast<double>(done_)), human_count(static_cast<double>(total_)), unit_);
  } else {
    line += fmt::format("{} {}", human_count(static_cast<double>(done_)), unit_);
  }
  if (rate_done_ >= 0) {
    line += fmt::format("  {} {}/s", human_count(static_cast<double>(rate_done_) / elapsed), rate_unit_);
  } else {
    line += fmt::format("  {} {}/s", human_count(speed), unit_);
  }
  if (total_ > 0 && speed > 0 && !finished_) {
    line += "  ETA " + human_duration(static_cast<double>(total_ - done_) / speed);
  } else {
    line += "  took " + human_duration(elapsed);
  }
  if (!extra_.empty()) line += "  " + extra_;
  if (on_terminal()) {
    if (line.size() > terminal_columns() - 1) line.resize(terminal_columns() - 1);
    std::fprintf(stderr, "\r\033[K%s", line.c_str());
    g_line_open = true;
  } else {
    std::fprintf(stderr, "%s\n", line.c_str());
  }
  std::fflush(stderr);
}

void Progress::finish(const std::string& summary) {
  if (finished_) return;
  finished_ = true;
  if (!summary.empty()) extra_ = summary;
  if (!shown_) return;
  draw(true);
  if (on_terminal() && !g_quiet) {
    std::fputc('\n', stderr);
    g_line_open = false;
  }
}

}  // namespace mm
