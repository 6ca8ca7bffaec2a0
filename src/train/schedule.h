// Learning rate by optimizer step.
#pragma once

#include <cstdint>
#include <string>

namespace mm {

enum class ScheduleKind { cosine, constant, linear, wsd };

// With w = warmup_steps, n = total_steps and p = (step - w) / (n - w), the rate after warm-up is base_lr times
//   cosine    min_ratio + (1 - min_ratio) / 2 * (1 + cos(pi * p)); with w = 0 and min_ratio = 0.1 this is MiniMind's
//             lr * (0.1 + 0.45 * (1 + cos(pi * step / total)))
//   constant  1
//   linear    1 at p = 0 down to min_ratio at p = 1
//   wsd       (warm-up, stable, decay) 1, then linearly down to min_ratio over the last decay_share of all n steps
// and during warm-up (step <= w) step / w.
struct Schedule {
  ScheduleKind kind = ScheduleKind::cosine;
  double base_lr = 5e-4;
  int64_t warmup_steps = 0;
  int64_t total_steps = 1;
  double decay_share = 0.1;  // wsd only
  double min_ratio = 0.1;    // cosine, linear, wsd
};

// Error naming the field when a value is out of range.
void check_schedule(const Schedule& schedule);

// The rate of optimizer step `step`, counted from 1. Steps past the end keep the last rate. `schedule` must have passed
// check_schedule. Pure.
double lr_at(const Schedule& schedule, int64_t step);

ScheduleKind schedule_kind_from_name(const std::string& name);  // Error listing the names
const char* schedule_kind_name(ScheduleKind kind);

}  // namespace mm
