// Zones: how long each op took, how many bytes it had to move and how many operations it had to do.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace mm {

struct ZoneStats {
  std::string name;
  int64_t calls = 0;
  double seconds = 0, bytes = 0, flops = 0;
};

// Not thread safe: ops are issued by one thread.
class Profiler {
 public:
  // Work that is asynchronous (a GPU's) is waited for at both ends of a zone with this.
  explicit Profiler(std::function<void()> wait = nullptr) : wait_(std::move(wait)) {}
  void wait() const {
    if (wait_) wait_();
  }
  void add(std::string_view name, double seconds, double bytes, double flops);
  void reset() { zones_.clear(); }
  std::vector<ZoneStats> zones() const;  // longest first

 private:
  std::function<void()> wait_;
  std::map<std::string, ZoneStats, std::less<>> zones_;
};

class Zone {
 public:
  // bytes and flops are the op's floor: what it must move and compute at least, not what a kernel happens to do.
  Zone(Profiler* profiler, const char* name, double bytes, double flops);
  ~Zone();
  Zone(const Zone&) = delete;
  Zone& operator=(const Zone&) = delete;

 private:
  Profiler* profiler_;
  const char* name_;
  double bytes_, flops_, start_ = 0;
};

}  // namespace mm
