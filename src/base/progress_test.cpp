#include "base/progress.h"

#include <gtest/gtest.h>

namespace mm {

TEST(Human, Numbers) {
  EXPECT_EQ(human_count(0), "0");
  EXPECT_EQ(human_count(999), "999");
  EXPECT_EQ(human_count(1234567), "1.23M");
  EXPECT_EQ(human_count(63.9e6), "63.9M");
  EXPECT_EQ(human_bytes(1000), "1000 B");
  EXPECT_EQ(human_bytes(1234567), "1.18 MiB");
  EXPECT_EQ(human_duration(75), "1:15");
  EXPECT_EQ(human_duration(3725.4), "1:02:05");
  EXPECT_EQ(human_duration(-1), "0:00");
}

TEST(Progress, QuickWorkSaysNothing) {
  testing::internal::CaptureStderr();
  {
    Progress progress("work", 10, "rows");
    for (int i = 0; i <= 10; i++) progress.set(i);
  }
  EXPECT_EQ(testing::internal::GetCapturedStderr(), "");
}

}  // namespace mm
