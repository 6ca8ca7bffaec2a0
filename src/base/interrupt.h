// Ctrl-C as a request: long work asks whether to stop at a safe point.
//
// No signal handler may run on a thread that computes: oneDNN's compiled kernels keep data below the stack pointer,
// where the kernel builds the handler's frame (with handlers at 10 kHz training crashed within 300 steps in 6 of 6
// runs, with SIGINT once in 30). So one thread of its own takes SIGINT and SIGTERM, and all others block them.
#pragma once

namespace mm {

// The first statement of a program, before any other thread exists. Without it (in a library, in unit tests) SIGINT and
// SIGTERM keep their old action and the classes below see nothing.
void start_interrupt_thread();

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

// While alive, SIGINT makes a system call of this thread (which must not compute meanwhile) return EINTR. One at a time
// in a process, on the thread that created it.
class InterruptibleRead {
 public:
  InterruptibleRead();
  ~InterruptibleRead();
  InterruptibleRead(const InterruptibleRead&) = delete;
  InterruptibleRead& operator=(const InterruptibleRead&) = delete;
};

}  // namespace mm
