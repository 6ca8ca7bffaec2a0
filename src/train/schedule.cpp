#include "train/schedule.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <numbers>

#include "base/error.h"

namespace mm {

static constexpr const char* kNames[] = {"cosine", "constant", "linear", "wsd"};

ScheduleKind schedule_kind_from_name(const std::string& name) {
  const auto it = std::find(std::begin(kNames), std::end(kNames), name);
  if (it == std::end(kNames)) {
    throw Error("learning-rate schedule", "cosine, constant, linear or wsd", fmt::format("\"{}\"", name));
  }
  return static_cast<ScheduleKind>(it - std::begin(kNames));
}

const char* schedule_kind_name(ScheduleKind kind) { return kNames[static_cast<int>(kind)]; }

void check_schedule(const Schedule& s) {
  if (!(s.base_lr > 0) || !std::isfinite(s.base_lr)) {
    throw Error("learning rate", "a finite number above 0", fmt::format("{}", s.base_lr));
  }
  if (s.total_steps < 1) throw Error("total steps", "at least 1", fmt::format("{}", s.total_steps));
  if (s.warmup_steps < 0 || s.warmup_steps >= s.total_steps) {
    throw Error("warm-up steps", fmt::format("0 to {} (total steps - 1)", s.total_steps - 1),
                fmt::format("{}", s.warmup_steps));
  }
  if (!(s.min_ratio >= 0 && s.min_ratio <= 1)) {
    throw Error("lowest share of the learning rate", "0 to 1", fmt::format("{}", s.min_ratio));
  }
  if (!(s.decay_share > 0 && s.decay_share <= 1)) {
    throw Error("decay share", "above 0 and at most 1", fmt::format("{}", s.decay_share));
  }
}

double lr_at(const Schedule& s, int64_t step) {
  MM_CHECK(step >= 1, "step {}", step);
  if (step <= s.warmup_steps) {
    return s.base_lr * (static_cast<double>(step) / static_cast<double>(s.warmup_steps));
  }
  step = std::min(step, s.total_steps);
  const double done = static_cast<double>(step - s.warmup_steps);
  const double length = static_cast<double>(s.total_steps - s.warmup_steps);
  switch (s.kind) {
    case ScheduleKind::constant: return s.base_lr;
    case ScheduleKind::cosine:
      return s.base_lr * (s.min_ratio + (1 - s.min_ratio) / 2 * (1 + std::cos(std::numbers::pi * done / length)));
    case ScheduleKind::linear: return s.base_lr * (1 - (1 - s.min_ratio) * (done / length));
    case ScheduleKind::wsd: {
      const double decay = std::min(length, std::max(1.0, s.decay_share * static_cast<double>(s.total_steps)));
      const double into_decay = std::max(0.0, done - (length - decay));
      return s.base_lr * (1 - (1 - s.min_ratio) * (into_decay / decay));
    }
  }
  MM_CHECK(false, "schedule kind {}", static_cast<int>(s.kind));
  return 0;
}

}  // namespace mm
