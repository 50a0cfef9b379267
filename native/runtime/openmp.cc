#include "kts/openmp.h"

#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <exception>
#include <latch>
#include <system_error>
#include <thread>
#include <vector>

namespace kts {

namespace {

constexpr int kSpareThreads = 32;  // that others may start meanwhile

// What libgomp exports: its manual, and `GOMP_parallel` of its stable binary interface.
struct Gomp {
  void (*parallel)(void (*fn)(void*), void* data, unsigned threads, unsigned flags);
  int (*max_threads)();
  int (*num_procs)();
};

template <class Fn>
Fn gomp_symbol(const char* name) {
  void* symbol = dlsym(RTLD_DEFAULT, name);
  Dl_info info;  // other runtimes export the same names with other costs
  if (symbol == nullptr || dladdr(symbol, &info) == 0 || info.dli_fname == nullptr) return nullptr;
  return std::strstr(info.dli_fname, "libgomp") == nullptr ? nullptr : reinterpret_cast<Fn>(symbol);
}

Gomp find_gomp() {
  const Gomp gomp{gomp_symbol<decltype(Gomp::parallel)>("GOMP_parallel"),
                  gomp_symbol<decltype(Gomp::max_threads)>("omp_get_max_threads"),
                  gomp_symbol<decltype(Gomp::num_procs)>("omp_get_num_procs")};
  const bool has_all = gomp.parallel != nullptr && gomp.max_threads != nullptr && gomp.num_procs != nullptr;
  return has_all ? gomp : Gomp{};
}

// Whether so many threads can be started: libgomp ends the process where one of its own cannot.
bool can_start(int threads) {
  std::vector<std::thread> started;
  std::latch all_started(1);
  bool can = true;
  try {
    started.reserve(static_cast<size_t>(threads));
    for (int i = 0; i < threads; ++i) started.emplace_back([&] { all_started.wait(); });
  } catch (const std::exception&) {
    can = false;
  }
  all_started.count_down();
  for (std::thread& one : started) one.join();
  return can;
}

// A team belongs to the thread that made it and ends with it, so that one stays; it takes no signals.
void keep_a_team(const Gomp& gomp) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  const int threads = gomp.num_procs() + 1;
  if (can_start(threads + kSpareThreads)) {
    try {
      std::thread([gomp, threads] {
        gomp.parallel([](void*) {}, nullptr, static_cast<unsigned>(threads), 0);
        for (;;) ::pause();
      }).detach();
    } catch (const std::system_error&) {  // somebody took the last one: then they spin
    }
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

std::atomic<bool> is_done{false};

}  // namespace

void leave_openmp_threads() { is_done.store(true); }

void calm_openmp_threads() {
  if (is_done.load(std::memory_order_relaxed)) return;
  static const Gomp gomp = find_gomp();
  if (gomp.parallel == nullptr || gomp.max_threads() < 2) return;
  if (!is_done.exchange(true)) keep_a_team(gomp);
}

}  // namespace kts
