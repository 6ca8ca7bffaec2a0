#include "train/schedule.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numbers>

#include "base/error.h"

namespace mm {

TEST(Schedule, CosineIsMiniMinds) {
  const Schedule s{.kind = ScheduleKind::cosine, .base_lr = 5e-4, .total_steps = 137};
  check_schedule(s);
  for (int64_t step = 1; step <= 137; step++) {
    const double theirs = 5e-4 * (0.1 + 0.45 * (1 + std::cos(std::numbers::pi * static_cast<double>(step) / 137)));
    EXPECT_DOUBLE_EQ(lr_at(s, step), theirs) << step;
  }
  EXPECT_DOUBLE_EQ(lr_at(s, 137), 5e-5);
  EXPECT_EQ(lr_at(s, 1000), lr_at(s, 137));  // a longer run than planned keeps the last rate
}

TEST(Schedule, WarmupRisesLinearlyAndMeetsTheSchedule) {
  for (const auto kind : {ScheduleKind::cosine, ScheduleKind::constant, ScheduleKind::linear, ScheduleKind::wsd}) {
    const Schedule s{.kind = kind, .base_lr = 1.0, .warmup_steps = 10, .total_steps = 110};
    for (int64_t step = 1; step <= 10; step++) EXPECT_DOUBLE_EQ(lr_at(s, step), static_cast<double>(step) / 10);
    double last = lr_at(s, 10);
    for (int64_t step = 11; step <= 110; step++) {
      EXPECT_LE(lr_at(s, step), last);
      last = lr_at(s, step);
    }
    EXPECT_DOUBLE_EQ(last, kind == ScheduleKind::constant ? 1.0 : 0.1);
  }
}

TEST(Schedule, LinearHalfWay) {
  const Schedule s{.kind = ScheduleKind::linear, .base_lr = 2.0, .total_steps = 100, .min_ratio = 0.0};
  EXPECT_DOUBLE_EQ(lr_at(s, 50), 1.0);
  EXPECT_DOUBLE_EQ(lr_at(s, 100), 0.0);
}

TEST(Schedule, WsdStaysThenDecays) {
  const Schedule s{.kind = ScheduleKind::wsd,
                   .base_lr = 1.0,
                   .warmup_steps = 5,
                   .total_steps = 100,
                   .decay_share = 0.2,
                   .min_ratio = 0};
  for (int64_t step = 5; step <= 80; step++) EXPECT_DOUBLE_EQ(lr_at(s, step), 1.0) << step;
  EXPECT_DOUBLE_EQ(lr_at(s, 81), 0.95);
  EXPECT_DOUBLE_EQ(lr_at(s, 90), 0.5);
  EXPECT_DOUBLE_EQ(lr_at(s, 100), 0.0);
  // All decay, and a decay share that leaves less than one step.
  const Schedule all{.kind = ScheduleKind::wsd, .base_lr = 1.0, .total_steps = 10, .decay_share = 1, .min_ratio = 0};
  EXPECT_DOUBLE_EQ(lr_at(all, 5), 0.5);
  const Schedule one{.kind = ScheduleKind::wsd, .base_lr = 1.0, .total_steps = 10, .decay_share = 1e-6, .min_ratio = 0};
  EXPECT_DOUBLE_EQ(lr_at(one, 9), 1.0);
  EXPECT_DOUBLE_EQ(lr_at(one, 10), 0.0);
}

TEST(Schedule, NamesRoundTripAndUnknownOneIsAnError) {
  for (const auto kind : {ScheduleKind::cosine, ScheduleKind::constant, ScheduleKind::linear, ScheduleKind::wsd}) {
    EXPECT_EQ(schedule_kind_from_name(schedule_kind_name(kind)), kind);
  }
  EXPECT_THROW(schedule_kind_from_name("Cosine"), Error);
  EXPECT_THROW(schedule_kind_from_name(""), Error);
}

TEST(Schedule, ValuesOutOfRangeAreErrors) {
  const Schedule good;
  EXPECT_NO_THROW(check_schedule(good));
  const auto bad = [&](auto change) {
    Schedule s = good;
    change(s);
    EXPECT_THROW(check_schedule(s), Error);
  };
  bad([](Schedule& s) { s.base_lr = 0; });
  bad([](Schedule& s) { s.base_lr = std::nan(""); });
  bad([](Schedule& s) { s.base_lr = INFINITY; });
  bad([](Schedule& s) { s.total_steps = 0; });
  bad([](Schedule& s) { s.warmup_steps = -1; });
  bad([](Schedule& s) { s.warmup_steps = s.total_steps; });
  bad([](Schedule& s) { s.min_ratio = 1.5; });
  bad([](Schedule& s) { s.decay_share = 0; });
}

}  // namespace mm
