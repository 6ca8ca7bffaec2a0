// Ctrl-C as a request: long work asks whether to stop at a safe point.
#pragma once

namespace mm {

// While alive, the first SIGINT or SIGTERM sets a flag instead of ending the program; a second one ends it at once. One
// at a time in a process.
class InterruptGuard {
 public:
  InterruptGuard();
  ~InterruptGuard();
  InterruptGuard(const InterruptGuard&) = delete;
  InterruptGuard& operator=(const InterruptGuard&) = delete;
  static bool requested();  // any thread
};

}  // namespace mm
