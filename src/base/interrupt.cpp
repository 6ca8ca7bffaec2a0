#include "base/interrupt.h"

#include <pthread.h>
#include <signal.h>

#include <atomic>
#include <initializer_list>
#include <mutex>
#include <thread>

#include "base/error.h"

namespace mm {

static std::atomic<bool> g_guarded{false}, g_requested{false};
static std::mutex g_reader_mutex;
static bool g_reading = false;  // under g_reader_mutex, as is the next
static pthread_t g_reader;

static sigset_t set_of(std::initializer_list<int> signals) {
  sigset_t set;
  sigemptyset(&set);
  for (const int s : signals) sigaddset(&set, s);
  return set;
}

static bool sent_to_reader(int signal) {
  const std::lock_guard lock(g_reader_mutex);
  return signal == SIGINT && g_reading && pthread_kill(g_reader, SIGUSR1) == 0;
}

static void take_signals() {
  const sigset_t ours = set_of({SIGINT, SIGTERM});
  for (;;) {
    int signal = 0;
    if (sigwait(&ours, &signal) != 0 || sent_to_reader(signal)) continue;
    if (g_guarded && !g_requested.exchange(true)) continue;
    const sigset_t one = set_of({signal});  // the default action: the end, unless the signal is ignored (nohup)
    raise(signal);
    pthread_sigmask(SIG_UNBLOCK, &one, nullptr);
    pthread_sigmask(SIG_BLOCK, &one, nullptr);
  }
}

void start_interrupt_thread() {
  // SIGUSR1 wakes a reader, see InterruptibleRead; its default action must not end a program between two reads.
  const sigset_t blocked = set_of({SIGINT, SIGTERM, SIGUSR1});
  MM_CHECK(pthread_sigmask(SIG_BLOCK, &blocked, nullptr) == 0);
  std::thread(take_signals).detach();
}

InterruptGuard::InterruptGuard() {
  g_requested = false;
  MM_CHECK(!g_guarded.exchange(true));
}

InterruptGuard::~InterruptGuard() { g_guarded = false; }

bool InterruptGuard::requested() { return g_requested; }

InterruptibleRead::InterruptibleRead() {
  struct sigaction action {};
  action.sa_handler = [](int) {};  // and no SA_RESTART: the read ends
  sigaction(SIGUSR1, &action, nullptr);
  const sigset_t wake = set_of({SIGUSR1});
  pthread_sigmask(SIG_UNBLOCK, &wake, nullptr);
  const std::lock_guard lock(g_reader_mutex);
  MM_CHECK(!g_reading);
  g_reading = true;
  g_reader = pthread_self();
}

InterruptibleRead::~InterruptibleRead() {
  {
    const std::lock_guard lock(g_reader_mutex);
    g_reading = false;
  }
  const sigset_t wake = set_of({SIGUSR1});
  pthread_sigmask(SIG_BLOCK, &wake, nullptr);
  struct sigaction action {};
  action.sa_handler = SIG_DFL;
  sigaction(SIGUSR1, &action, nullptr);
}

}  // namespace mm
