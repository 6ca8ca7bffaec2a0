// A barrier for the threads of one team inside a parallel region: about 0.4 us where every thread has a core. Threads
// that wait long sleep, so that on a busy machine the ones they wait for get the cores.
#pragma once

#include <atomic>

namespace mm {

class SpinBarrier {
 public:
  // All n threads of the team call it; what one wrote before, the others see after.
  void wait(int n) {
    if (n == 1) return;
    const int phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == n) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      phase_.notify_all();
      return;
    }
    for (int spin = 0; spin < spins_before_sleep; spin++) {
      if (phase_.load(std::memory_order_acquire) != phase) return;
      pause();
    }
    phase_.wait(phase, std::memory_order_acquire);
  }

 private:
  // About 400 us where a pause takes 40 ns. Far above the time that waking takes: with 40 us one late thread made all
  // the others sleep, and be late themselves, at every barrier that followed.
  static constexpr int spins_before_sleep = 10000;
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> phase_{0};
};

}  // namespace mm
