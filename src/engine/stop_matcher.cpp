#include "engine/stop_matcher.h"

#include <algorithm>
#include <utility>

#include "base/error.h"

namespace mm {

size_t partial_match_at_end(std::string_view text, std::string_view pattern) {
  for (size_t n = std::min(text.size(), pattern.size() - 1); n > 0; n--) {
    if (text.ends_with(pattern.substr(0, n))) return n;
  }
  return 0;
}

StopMatcher::StopMatcher(std::vector<std::string> stops) : stops_(std::move(stops)) {
  for (const auto& s : stops_) {
    if (s.empty()) throw Error("stop string", "at least one character", "an empty one");
  }
}

std::string StopMatcher::push(std::string_view text) {
  if (matched_) return "";
  held_ += text;
  size_t first_end = std::string::npos, begin = 0;
  for (const auto& s : stops_) {
    const size_t at = held_.find(s);
    if (at == std::string::npos) continue;
    const size_t end = at + s.size();
    if (end < first_end || (end == first_end && at < begin)) first_end = end, begin = at;
  }
  if (first_end != std::string::npos) {
    matched_ = true;
    held_.resize(begin);
    return std::exchange(held_, "");
  }
  size_t keep = 0;
  for (const auto& s : stops_) keep = std::max(keep, partial_match_at_end(held_, s));
  std::string out = held_.substr(0, held_.size() - keep);
  held_.erase(0, out.size());
  return out;
}

std::string StopMatcher::flush() { return std::exchange(held_, ""); }

}  // namespace mm
