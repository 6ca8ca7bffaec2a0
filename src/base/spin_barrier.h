// A barrier for the threads of one team inside a parallel region. In a small team every thread raises one flag for each
// of the others, each flag on a cache line that only those two touch: 250 ns between four cores, where one flag a
// thread takes 350 and a common counter, whose line passes from core to core, more. Threads that wait long sleep, so
// that on a busy machine the ones they wait for get the cores.
#pragma once

#include <atomic>
#include <cstdint>

namespace mm {

class SpinBarrier {
 public:
  // Before a team of n threads begins to wait; no thread may be waiting.
  void begin(int n) {
    if (n == n_) return;
    for (auto& of_thread : flags_)
      for (Flag& f : of_thread) f.raised.store(0, std::memory_order_relaxed);
    n_ = n;
  }

  // All n threads of the team call it, each with its number; what one wrote before, the others see after. meanwhile()
  // is called over and over while the thread waits, and should take no longer than a few dozen instructions.
  template <class F>
  void wait(int thread, int n, F&& meanwhile) {
    if (n == 1) return;
    if (n > max_flags) {
      wait_counting(n);
      return;
    }
    // One less than what all of this round raise.
    const uint32_t before = flags_[thread][thread].raised.load(std::memory_order_relaxed);
    flags_[thread][thread].raised.store(before + 1, std::memory_order_relaxed);
    for (int t = 0; t < n; t++)
      if (t != thread) flags_[t][thread].raised.store(before + 1, std::memory_order_release);
    for (int t = 0; t < n; t++)
      if (t != thread) flags_[t][thread].raised.notify_all();
    const Flag* const mine = flags_[thread];
    for (int spin = 0; spin < spins_before_sleep; spin++) {
      bool all = true;  // looks at all flags at once, so that their cache lines travel at the same time
      for (int t = 0; t < n; t++) all &= mine[t].raised.load(std::memory_order_acquire) != before;
      if (all) return;
      meanwhile();
      pause();
    }
    for (int t = 0; t < n; t++) mine[t].raised.wait(before, std::memory_order_acquire);
  }

 private:
  static constexpr int max_flags = 8;
  // About 400 us where a pause takes 40 ns. Far above the time that waking takes: with 40 us one late thread made all
  // the others sleep, and be late themselves, at every barrier that followed.
  static constexpr int spins_before_sleep = 10000;

  struct alignas(64) Flag {
    std::atomic<uint32_t> raised{0};  // goes round
  };

  void wait_counting(int n) {
    std::atomic<uint32_t>& round = flags_[0][0].raised;
    const uint32_t before = round.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == n) {
      arrived_.store(0, std::memory_order_relaxed);
      round.store(before + 1, std::memory_order_release);
      round.notify_all();
      return;
    }
    for (int spin = 0; spin < spins_before_sleep; spin++) {
      if (round.load(std::memory_order_acquire) != before) return;
      pause();
    }
    round.wait(before, std::memory_order_acquire);
  }

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  int n_ = 0;
  alignas(64) std::atomic<int> arrived_{0};
  Flag flags_[max_flags][max_flags];  // [waiting thread][raising thread]
};

}  // namespace mm
