// One live progress line on standard error for anything that may take longer than two seconds.
#pragma once

#include <cstdint>
#include <string>

namespace mm {

// Draws "title  42% |#####     | 1.2M/2.9M tok  53.1k tok/s  ETA 0:31  extra". On a terminal the line is redrawn at
// most ten times a second; elsewhere (pipe, file, CI) one plain line is written every ten seconds. Nothing is drawn
// during the first two seconds, so quick work stays quiet. Not thread safe: one owner drives it.
class Progress {
 public:
  // total <= 0: unknown length (no bar, no ETA). unit: "tok", "B", "rows", ...
  Progress(std::string title, int64_t total, std::string unit);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  void set(int64_t done, const std::string& extra = "");  // absolute position
  void rate_units(int64_t units_done,
                  std::string unit);  // show speed in another unit, counted from 0 (steps as position, tok/s as speed)
  void finish(const std::string& summary = "");  // final line; called by the destructor if needed

  static void set_quiet(bool quiet);  // --quiet: draw nothing
  static void clear_line();           // used by the log so that lines do not mix with the bar

 private:
  void draw(bool force);

  std::string title_, unit_, rate_unit_, extra_;
  int64_t total_ = 0, done_ = 0, first_ = -1, rate_done_ = -1;
  double start_ = 0, last_draw_ = 0;
  bool shown_ = false, finished_ = false;
};

double now_seconds();                        // monotonic clock
std::string human_count(double n);           // 1234567 -> "1.23M"
std::string human_bytes(double n);           // 1234567 -> "1.18 MiB"
std::string human_duration(double seconds);  // 75 -> "1:15"

}  // namespace mm
