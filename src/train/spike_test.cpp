#include "train/spike.h"

#include <gtest/gtest.h>

#include <cmath>

#include "base/error.h"
#include "base/rng.h"

namespace mm {

static double noisy_loss(uint64_t i) { return 3.0 + 0.1 * static_cast<double>(philox_normal(7, 0, i)); }

TEST(Spike, NoiseAndDescentPassSpikesAreSkipped) {
  SpikeDetector detector({});
  for (uint64_t i = 0; i < 1000; i++)
    EXPECT_FALSE(detector.observe(6.0 / (1.0 + 0.01 * double(i)) + noisy_loss(i))) << i;
  EXPECT_TRUE(detector.observe(9.0));
  EXPECT_GT(detector.last_z(), 6.0);
  EXPECT_FALSE(detector.observe(noisy_loss(1001)));
  EXPECT_EQ(detector.skipped(), 1);
}

TEST(Spike, NothingIsSkippedWhileWarmingUpOrWhenOff) {
  SpikeDetector detector({.warmup = 10});
  for (uint64_t i = 0; i < 9; i++) EXPECT_FALSE(detector.observe(noisy_loss(i)));
  EXPECT_FALSE(detector.observe(100.0));
  SpikeDetector off({.threshold = 0});
  for (uint64_t i = 0; i < 200; i++) EXPECT_FALSE(off.observe(i == 150 ? 1e6 : noisy_loss(i)));
}

TEST(Spike, ConstantLossHasAFloorUnderItsSpread) {
  SpikeDetector detector({});
  for (int i = 0; i < 100; i++) EXPECT_FALSE(detector.observe(2.0));
  EXPECT_FALSE(detector.observe(2.001));  // far above a spread of zero, but no spike
  EXPECT_TRUE(detector.observe(2.1));
}

TEST(Spike, ANewLevelIsBelievedAfterAFewSkips) {
  SpikeDetector detector({.max_consecutive = 3});
  for (uint64_t i = 0; i < 100; i++) detector.observe(noisy_loss(i));
  for (int i = 0; i < 3; i++) EXPECT_TRUE(detector.observe(8.0));
  for (int i = 0; i < 200; i++) EXPECT_FALSE(detector.observe(8.0 + 0.01 * (i % 3)));
  EXPECT_EQ(detector.skipped(), 3);
}

TEST(Spike, NotFiniteIsSkippedAndLeavesNoTrace) {
  SpikeDetector a({}), b({});
  for (uint64_t i = 0; i < 100; i++) {
    EXPECT_EQ(a.observe(noisy_loss(i)), b.observe(noisy_loss(i)));
    if (i % 7 == 0) {
      EXPECT_TRUE(a.observe(std::nan("")));
      EXPECT_TRUE(a.observe(INFINITY));
    }
  }
  EXPECT_EQ(a.to_json(), b.to_json());
}

TEST(Spike, RestoredDecidesAsUninterrupted) {
  SpikeDetector whole({.window = 50, .warmup = 20}), before = whole;
  const auto loss = [](uint64_t i) { return i % 37 == 36 ? noisy_loss(i) + 2 : noisy_loss(i); };
  for (uint64_t i = 0; i < 177; i++) whole.observe(loss(i)), before.observe(loss(i));
  SpikeDetector after({.window = 50, .warmup = 20});
  after.restore(parse_json(before.to_json().dump(), "state"), "state");
  for (uint64_t i = 177; i < 500; i++) {
    EXPECT_EQ(whole.observe(loss(i)), after.observe(loss(i))) << i;
    EXPECT_EQ(whole.last_z(), after.last_z());  // to the bit
  }
  EXPECT_EQ(whole.to_json(), after.to_json());
  EXPECT_GT(whole.skipped(), 0);
}

TEST(Spike, MalformedStateIsAnErrorAndChangesNothing) {
  SpikeDetector detector({});
  for (uint64_t i = 0; i < 50; i++) detector.observe(noisy_loss(i));
  const auto state = detector.to_json();
  for (const char* bad :
       {"{}", R"({"losses":3,"skipped":0,"consecutive":0})", R"({"losses":["a"],"skipped":0,"consecutive":0})",
        R"({"losses":[1],"skipped":-1,"consecutive":0})", "[]"}) {
    EXPECT_THROW(detector.restore(parse_json(bad, "state"), "state"), Error) << bad;
    EXPECT_EQ(detector.to_json(), state);
  }
}

TEST(Spike, OptionsOutOfRangeAreErrors) {
  EXPECT_THROW(SpikeDetector({.threshold = -1}), Error);
  EXPECT_THROW(SpikeDetector({.threshold = std::nan("")}), Error);
  EXPECT_THROW(SpikeDetector({.window = 1}), Error);
  EXPECT_THROW(SpikeDetector({.window = 10, .warmup = 11}), Error);
  EXPECT_THROW(SpikeDetector({.max_consecutive = 0}), Error);
}

}  // namespace mm
