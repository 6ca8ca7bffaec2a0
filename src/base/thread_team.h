// One team of threads for the whole process, shared with the GEMM library (both use the OpenMP runtime, so cores are
// never oversubscribed). Call from one thread at a time; a nested call runs sequentially. If calls of f
// throw, one of the exceptions reaches the caller after all threads are done.
#pragma once

#include <cstdint>
#include <memory>

namespace mm {

int num_threads();
void set_num_threads(int n);  // 0: all cores this process may use. Call while no parallel work runs.

// Ends the waiting threads of the calling thread's team; its next parallel work makes them again. For a thread that
// hands parallel work over to another one: with more threads than cores, idle ones counted, libgomp lets all of them
// sleep at once between regions (a step of decoding took 406 us instead of 290).
void release_team();

namespace detail {
void run_team(void (*fn)(void* ctx, int thread, int n_threads), void* ctx);
void run_dynamic(int64_t n, void (*fn)(void* ctx, int64_t i, int thread), void* ctx);
}  // namespace detail

// f(thread, n_threads) on every thread of the team.
template <class F>
void parallel_team(F&& f) {
  detail::run_team([](void* c, int t, int n) { (*static_cast<std::remove_reference_t<F>*>(c))(t, n); },
                   const_cast<void*>(static_cast<const void*>(std::addressof(f))));
}

// f(begin, end) over a static split of [0, n) into at most one range a thread, each at least `grain` long (the last may
// be shorter). The split depends on n, grain and the thread count only.
template <class F>
void parallel_for(int64_t n, int64_t grain, F&& f) {
  if (n <= 0) return;
  if (n <= grain || num_threads() == 1) {
    f(int64_t{0}, n);
    return;
  }
  parallel_team([&](int thread, int n_threads) {
    int64_t chunk = (n + n_threads - 1) / n_threads;
    if (chunk < grain) chunk = grain;
    const int64_t begin = chunk * thread, end = begin + chunk < n ? begin + chunk : n;
    if (begin < end) f(begin, end);
  });
}

// f(i, thread) for i in [0, n), handed out one by one: for tasks of unequal size. f must not depend on the order.
template <class F>
void parallel_dynamic(int64_t n, F&& f) {
  detail::run_dynamic(
      n, [](void* c, int64_t i, int t) { (*static_cast<std::remove_reference_t<F>*>(c))(i, t); },
      const_cast<void*>(static_cast<const void*>(std::addressof(f))));
}

}  // namespace mm
