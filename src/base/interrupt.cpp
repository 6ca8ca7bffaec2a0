#include "base/interrupt.h"

#include <signal.h>

#include "base/error.h"

namespace mm {

static volatile sig_atomic_t g_requested = 0;
static bool g_installed = false;
static struct sigaction g_old_int, g_old_term;

static void on_signal(int) { g_requested = 1; }

InterruptGuard::InterruptGuard() {
  MM_CHECK(!g_installed);
  g_installed = true;
  g_requested = 0;
  struct sigaction action {};
  action.sa_handler = on_signal;
  action.sa_flags = static_cast<int>(SA_RESETHAND) | SA_RESTART;
  sigaction(SIGINT, &action, &g_old_int);
  sigaction(SIGTERM, &action, &g_old_term);
}

InterruptGuard::~InterruptGuard() {
  sigaction(SIGINT, &g_old_int, nullptr);
  sigaction(SIGTERM, &g_old_term, nullptr);
  g_installed = false;
}

bool InterruptGuard::requested() { return g_requested != 0; }

}  // namespace mm
