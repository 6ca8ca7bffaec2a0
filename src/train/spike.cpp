#include "train/spike.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"

namespace mm {

SpikeDetector::SpikeDetector(SpikeOptions options) : options_(options) {
  const auto& o = options_;
  if (!(o.threshold >= 0)) throw Error("spike threshold", "0 (off) or more", fmt::format("{}", o.threshold));
  if (o.window < 2) throw Error("spike window", "at least 2", fmt::format("{}", o.window));
  if (o.warmup < 2 || o.warmup > o.window) {
    throw Error("spike warm-up", fmt::format("2 to {} (the window)", o.window), fmt::format("{}", o.warmup));
  }
  if (o.max_consecutive < 1) throw Error("spike skips in a row", "at least 1", fmt::format("{}", o.max_consecutive));
  window_.reserve(static_cast<size_t>(o.window));
}

bool SpikeDetector::observe(double loss) {
  if (options_.threshold == 0) return false;
  if (!std::isfinite(loss)) return true;
  last_z_ = 0;
  const auto n = static_cast<int64_t>(window_.size());
  if (n >= options_.warmup) {
    // Summed oldest to newest: the same bits whether the ring was filled in one run or restored.
    double mean = 0, var = 0;
    for (int64_t i = 0; i < n; i++) mean += window_[static_cast<size_t>((next_ + i) % n)];
    mean /= static_cast<double>(n);
    for (int64_t i = 0; i < n; i++) {
      const double d = window_[static_cast<size_t>((next_ + i) % n)] - mean;
      var += d * d;
    }
    const double std = std::max(std::sqrt(var / static_cast<double>(n)), 1e-3 * std::abs(mean));
    last_z_ = std > 0 ? (loss - mean) / std : 0;
    if (last_z_ > options_.threshold) {
      if (consecutive_ < options_.max_consecutive) {
        consecutive_++;
        skipped_++;
        return true;
      }
      window_.clear();
      next_ = 0;
    }
  }
  consecutive_ = 0;
  if (static_cast<int64_t>(window_.size()) < options_.window) {
    window_.push_back(loss);
  } else {
    window_[static_cast<size_t>(next_)] = loss;
    next_ = (next_ + 1) % options_.window;
  }
  return false;
}

ordered_json SpikeDetector::to_json() const {
  ordered_json losses = ordered_json::array();
  for (size_t i = 0; i < window_.size(); i++) {
    losses.push_back(window_[(static_cast<size_t>(next_) + i) % window_.size()]);
  }
  return {{"losses", losses}, {"skipped", skipped_}, {"consecutive", consecutive_}};
}

void SpikeDetector::restore(const ordered_json& state, const std::string& where) {
  const auto losses = json_get<ordered_json>(state, "losses", where);
  const auto skipped = json_get<int64_t>(state, "skipped", where);
  const auto consecutive = json_get<int64_t>(state, "consecutive", where);
  if (!losses.is_array()) throw Error(where + ": field \"losses\"", "a list of numbers", json_type_name(losses));
  if (skipped < 0 || consecutive < 0) throw Error(where, "counts of 0 or more", "a negative one");
  std::vector<double> values;
  values.reserve(static_cast<size_t>(options_.window));
  for (const auto& v : losses) {
    if (!v.is_number()) throw Error(where + ": field \"losses\"", "numbers", json_type_name(v));
    values.push_back(v.get<double>());
  }
  // A resume with a smaller window keeps the newest losses.
  const auto keep = std::min(values.size(), static_cast<size_t>(options_.window));
  values.erase(values.begin(), values.end() - static_cast<std::ptrdiff_t>(keep));
  values.reserve(static_cast<size_t>(options_.window));
  window_ = std::move(values);
  next_ = 0;
  skipped_ = skipped;
  consecutive_ = consecutive;
  last_z_ = 0;
}

}  // namespace mm
