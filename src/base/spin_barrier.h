// A barrier for the threads of one team inside a parallel region. In a small team every thread raises a flag of its own
// and waits for the others' flags: the cache lines travel at the same time, where a common counter passes from core to
// core. Threads that wait long sleep, so that on a busy machine the ones they wait for get the cores.
#pragma once

#include <atomic>

namespace mm {

class SpinBarrier {
 public:
  // All n threads of the team call it, each with its number; what one wrote before, the others see after. meanwhile()
  // is called over and over while the thread waits, and should take no longer than a few dozen instructions.
  template <class F>
  void wait(int thread, int n, F&& meanwhile) {
    if (n == 1) return;
    if (n > max_flags) {
      wait_counting(n);
      return;
    }
    std::atomic<int>& own = flags_[thread].raised;
    const int before = own.load(std::memory_order_relaxed);  // one less than what all of this round raise
    own.store(before + 1, std::memory_order_release);
    own.notify_all();
    for (int spin = 0; spin < spins_before_sleep; spin++) {
      bool all = true;  // looks at all flags at once, so that their cache lines travel at the same time
      for (int t = 0; t < n; t++) all &= flags_[t].raised.load(std::memory_order_acquire) != before;
      if (all) return;
      meanwhile();
      pause();
    }
    for (int t = 0; t < n; t++) flags_[t].raised.wait(before, std::memory_order_acquire);
  }

 private:
  static constexpr int max_flags = 16;
  // About 400 us where a pause takes 40 ns. Far above the time that waking takes: with 40 us one late thread made all
  // the others sleep, and be late themselves, at every barrier that followed.
  static constexpr int spins_before_sleep = 10000;

  struct alignas(64) Flag {
    std::atomic<int> raised{0};
  };

  void wait_counting(int n) {
    const int before = flags_[0].raised.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == n) {
      arrived_.store(0, std::memory_order_relaxed);
      flags_[0].raised.store(before + 1, std::memory_order_release);
      flags_[0].raised.notify_all();
    } else {
      leave(flags_[0].raised, before);
    }
  }

  // Returns when the value is another one; it may be one round ahead already.
  static void leave(std::atomic<int>& value, int before) {
    for (int spin = 0; spin < spins_before_sleep; spin++) {
      if (value.load(std::memory_order_acquire) != before) return;
      pause();
    }
    value.wait(before, std::memory_order_acquire);
  }
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  alignas(64) std::atomic<int> arrived_{0};
  Flag flags_[max_flags];
};

}  // namespace mm
