#include "base/thread_team.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <exception>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace mm {

static int g_threads = 0;

int num_threads() {
  if (g_threads == 0) set_num_threads(0);
  return g_threads;
}

#ifdef _OPENMP

static int cores_of_process() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
  return 1;
}

void set_num_threads(int n) {
  g_threads = n > 0 ? n : cores_of_process();
  omp_set_dynamic(0);
  omp_set_num_threads(g_threads);
}

void release_team() { (void)omp_pause_resource_all(omp_pause_soft); }

namespace detail {

void run_team(void (*fn)(void*, int, int), void* ctx) {
  const int n = num_threads();
  if (n == 1 || omp_in_parallel() != 0) {
    fn(ctx, 0, 1);
    return;
  }
  std::exception_ptr failure;
  std::atomic_flag failed = ATOMIC_FLAG_INIT;
#pragma omp parallel num_threads(n)
  {
    try {
      fn(ctx, omp_get_thread_num(), omp_get_num_threads());
    } catch (...) {  // an exception must not leave the region
      if (!failed.test_and_set()) failure = std::current_exception();
    }
  }
  if (failure) std::rethrow_exception(failure);
}

}  // namespace detail

#else  // built without OpenMP (fuzzers): everything runs on the calling thread

void set_num_threads(int) { g_threads = 1; }
void release_team() {}

namespace detail {
void run_team(void (*fn)(void*, int, int), void* ctx) { fn(ctx, 0, 1); }
}  // namespace detail

#endif

void detail::run_dynamic(int64_t n, void (*fn)(void*, int64_t, int), void* ctx) {
  std::atomic<int64_t> next{0};
  parallel_team([&](int thread, int) {
    for (int64_t i = next++; i < n; i = next++) fn(ctx, i, thread);
  });
}

}  // namespace mm
