// thread_team.h and rng.h: results do not depend on how work is handed out.
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "base/rng.h"
#include "base/spin_barrier.h"
#include "base/thread_team.h"

namespace mm {

TEST(ThreadTeam, EveryIndexOnce) {
  for (const int threads : {1, 2, 3, 8}) {
    set_num_threads(threads);
    for (const int64_t n : {0, 1, 7, 100, 1001}) {
      for (const int64_t grain : {1, 16, 5000}) {
        std::vector<int> seen(static_cast<size_t>(n), 0);
        parallel_for(n, grain, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; i++) seen[static_cast<size_t>(i)]++;
        });
        parallel_dynamic(n, [&](int64_t i, int) { seen[static_cast<size_t>(i)] += 10; });
        EXPECT_EQ(seen, std::vector<int>(static_cast<size_t>(n), 11));
      }
    }
  }
  set_num_threads(0);
}

TEST(ThreadTeam, NestedCallsRunHere) {
  set_num_threads(4);
  std::atomic<int> total{0};
  parallel_team([&](int, int) { parallel_team([&](int thread, int n) { total += thread == 0 && n == 1; }); });
  EXPECT_EQ(total, num_threads());
  set_num_threads(0);
}

// Plain numbers written before the barrier are all seen behind it, in small and large teams, also where the team's size
// changes between them and one thread sleeps through the others' spinning.
TEST(SpinBarrier, WhatWasWrittenBeforeIsSeenBehind) {
  SpinBarrier barrier;
  for (const int threads : {4, 2, 9, 3, 8, 1, 4}) {
    set_num_threads(threads);
    barrier.begin(threads);
    std::vector<int64_t> written(static_cast<size_t>(threads));
    std::atomic<int> wrong{0};
    parallel_team([&](int thread, int n) {
      for (int64_t round = 1; round <= 200; round++) {
        if (round == 100 && thread == 0) std::this_thread::sleep_for(std::chrono::milliseconds(20));
        written[static_cast<size_t>(thread)] = round * 100 + thread;
        barrier.wait(thread, n, [] {});
        for (int t = 0; t < n; t++) wrong += written[static_cast<size_t>(t)] != round * 100 + t;
        barrier.wait(thread, n, [] {});
      }
    });
    EXPECT_EQ(wrong, 0) << threads << " threads";
  }
  set_num_threads(0);
}

// Known answers of Philox4x32-10 (Random123's kat_vectors).
TEST(Rng, PhiloxKnownAnswers) {
  using Block = std::array<uint32_t, 4>;
  EXPECT_EQ(philox4x32(0, 0, 0), (Block{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(philox4x32(~uint64_t{0}, ~uint64_t{0}, ~uint64_t{0}),
            (Block{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(philox4x32(0x299f31d0a4093822, 0x0370734413198a2e, 0x85a308d3243f6a88),
            (Block{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(Rng, StreamsAndRanges) {
  Rng a{1, 2, 0}, b{1, 3, 0};
  EXPECT_NE(a.next_u64(), b.next_u64());
  Rng resumed{1, 2, 1};
  EXPECT_EQ(a.next_u32(), resumed.next_u32());
  double sum = 0, squares = 0;
  constexpr int n = 20000;
  std::vector<int> buckets(7, 0);
  for (int i = 0; i < n; i++) {
    const double x = philox_normal(9, 0, static_cast<uint64_t>(i));
    sum += x;
    squares += x * x;
    const float u = a.uniform();
    ASSERT_TRUE(u >= 0 && u < 1);
    buckets[a.below(7)]++;
  }
  EXPECT_NEAR(sum / n, 0, 0.03);
  EXPECT_NEAR(squares / n, 1, 0.05);
  for (const int count : buckets) EXPECT_NEAR(count, n / 7.0, 250);
}

}  // namespace mm
