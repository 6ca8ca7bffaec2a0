// A barrier for the threads of one team inside a parallel region: about 0.4 us where every thread has a core. Waiting
// threads spin and, when the others take long (more threads than cores), yield.
#pragma once

#include <sched.h>

#include <atomic>
#include <cstdint>

namespace mm {

class SpinBarrier {
 public:
  // All n threads of the team call it; what one wrote before, the others see after.
  void wait(int n) {
    if (n == 1) return;
    const uint32_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == n) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spin = 0; phase_.load(std::memory_order_acquire) == phase; spin++) {
      if (spin > spins_before_yield) sched_yield();
      else pause();
    }
  }

 private:
  static constexpr int spins_before_yield = 400;
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
};

}  // namespace mm
