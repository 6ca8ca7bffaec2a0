#include "prof/profiler.h"

#include <algorithm>

#include "base/progress.h"

namespace mm {

void Profiler::add(std::string_view name, double seconds, double bytes, double flops) {
  auto it = zones_.find(name);
  if (it == zones_.end()) it = zones_.emplace(std::string(name), ZoneStats{std::string(name)}).first;
  ZoneStats& z = it->second;
  z.calls++;
  z.seconds += seconds;
  z.bytes += bytes;
  z.flops += flops;
}

std::vector<ZoneStats> Profiler::zones() const {
  std::vector<ZoneStats> out;
  out.reserve(zones_.size());
  for (const auto& [name, z] : zones_) out.push_back(z);
  std::sort(out.begin(), out.end(), [](const ZoneStats& a, const ZoneStats& b) { return a.seconds > b.seconds; });
  return out;
}

Zone::Zone(Profiler* profiler, const char* name, double bytes, double flops)
    : profiler_(profiler), name_(name), bytes_(bytes), flops_(flops) {
  if (profiler_ == nullptr) return;
  profiler_->wait();
  start_ = now_seconds();
}

Zone::~Zone() {
  if (profiler_ == nullptr) return;
  profiler_->wait();
  profiler_->add(name_, now_seconds() - start_, bytes_, flops_);
}

}  // namespace mm
