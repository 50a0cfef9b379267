// Workers wait on a counter (spin ~50 us, then futex through std::atomic::wait), take tasks from an atomic index and
// are waited for by the caller, who works too. Idle workers cost nothing: torch's own threads get the cores between our
// calls.
#include "kts/thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <exception>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "kts/base.h"
#include "kts/topology.h"

namespace kts {

namespace {

void spin_pause() { __builtin_ia32_pause(); }

// Returns when value != old.
void wait_for_change(const std::atomic<uint32_t>& value, uint32_t old) {
  const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(50);
  do {
    for (int i = 0; i < 64; ++i) {
      if (value.load(std::memory_order_acquire) != old) return;
      spin_pause();
    }
  } while (std::chrono::steady_clock::now() < until);
  value.wait(old, std::memory_order_acquire);
}

void bind_to_cpus(const std::vector<int>& cpus) {
  if (cpus.empty()) return;  // one pool: wherever the process may run
  cpu_set_t set;
  CPU_ZERO(&set);
  for (const int cpu : cpus) CPU_SET(cpu, &set);
  sched_setaffinity(0, sizeof(set), &set);  // best effort: an unbound worker is slower, not wrong
}

}  // namespace

struct ThreadPool::State {
  std::vector<std::thread> workers;
  std::atomic<uint32_t> epoch{0};     // a new value: a job is there (or the end)
  std::atomic<uint32_t> finished{0};  // workers done with the current job
  std::atomic<int64_t> next{0};
  int64_t tasks = 0;
  const std::function<void(int64_t, int)>* fn = nullptr;
  std::atomic<bool> failed{false};
  std::exception_ptr error;
  bool ends = false;

  void work(int thread) {
    for (;;) {
      const int64_t task = next.fetch_add(1, std::memory_order_relaxed);
      if (task >= tasks || failed.load(std::memory_order_relaxed)) return;
      try {
        (*fn)(task, thread);
      } catch (...) {
        if (!failed.exchange(true)) error = std::current_exception();
      }
    }
  }

  void join() {
    ends = true;
    epoch.fetch_add(1, std::memory_order_release);
    epoch.notify_all();
    for (std::thread& worker : workers) worker.join();
  }

  void worker_main(int thread, const std::vector<int>& cpus) {
    bind_to_cpus(cpus);
    uint32_t seen = 0;
    for (;;) {
      wait_for_change(epoch, seen);
      seen = epoch.load(std::memory_order_acquire);
      if (ends) return;
      work(thread);
      finished.fetch_add(1, std::memory_order_release);
      finished.notify_one();
    }
  }
};

ThreadPool::ThreadPool(int threads, int pools) : state_(std::make_unique<State>()) {
  KTS_CHECK(threads >= 1, "threads: expected at least 1");
  const auto nodes = read_cpu_info().numa_nodes;
  KTS_CHECK(pools >= 1 && pools <= static_cast<int>(nodes.size() > 0 ? nodes.size() : 1),
            "threadpool_count: expected 1 up to the number of NUMA nodes of this machine");
  state_->workers.reserve(static_cast<size_t>(threads));
  try {
    for (int i = 1; i < threads; ++i) {
      const std::vector<int> cpus = pools == 1 ? std::vector<int>() : nodes[static_cast<size_t>(i * pools / threads)];
      state_->workers.emplace_back([state = state_.get(), i, cpus] { state->worker_main(i, cpus); });
    }
  } catch (const std::system_error& error) {
    const size_t started = state_->workers.size();
    state_->join();
    throw std::runtime_error("threads: the system started " + std::to_string(started) + " of " +
                             std::to_string(threads - 1) + " workers (" + error.what() + "); ask for fewer");
  }
}

ThreadPool::~ThreadPool() { state_->join(); }

int ThreadPool::threads() const { return static_cast<int>(state_->workers.size()) + 1; }

void ThreadPool::parallel_for(int64_t tasks, const std::function<void(int64_t, int)>& fn) {
  if (tasks <= 0) return;
  State& s = *state_;
  const bool alone = tasks == 1 || s.workers.empty();
  s.fn = &fn;
  s.tasks = tasks;
  s.failed = false;
  s.next.store(0, std::memory_order_relaxed);
  if (!alone) {
    s.finished.store(0, std::memory_order_relaxed);
    s.epoch.fetch_add(1, std::memory_order_release);
    s.epoch.notify_all();
  }
  s.work(0);
  if (!alone) {
    const uint32_t all = static_cast<uint32_t>(s.workers.size());
    for (uint32_t done = s.finished.load(std::memory_order_acquire); done != all;
         done = s.finished.load(std::memory_order_acquire))
      wait_for_change(s.finished, done);
  }
  if (s.failed) std::rethrow_exception(std::exchange(s.error, nullptr));
}

namespace {

int wanted_threads = 0;  // 0: default
int wanted_pools = 1;

// After fork() the child has none of the workers and may have inherited a locked mutex: it starts over with a fresh
// runtime, and the parent's is leaked on purpose (its destructor would join threads that do not exist).
Runtime* current = nullptr;

void make_runtime() {
  current = new Runtime;
  const int threads = wanted_threads > 0 ? wanted_threads : default_threads(read_cpu_info());
  current->pool = std::make_unique<ThreadPool>(threads, wanted_pools);
}

std::mutex& creation_mutex() {
  static std::mutex mutex;
  return mutex;
}

}  // namespace

Runtime& runtime() {
  std::lock_guard<std::mutex> lock(creation_mutex());
  if (current == nullptr) {
    static const int registered = pthread_atfork([] { creation_mutex().lock(); }, [] { creation_mutex().unlock(); },
                                                 [] {
                                                   current = nullptr;
                                                   creation_mutex().unlock();
                                                 });
    (void)registered;
    make_runtime();
  }
  return *current;
}

void set_threads(int threads, int pools) {
  auto pool = std::make_unique<ThreadPool>(threads, pools);
  Runtime& rt = runtime();
  std::lock_guard<std::mutex> lock(rt.mutex);
  rt.pool = std::move(pool);
  wanted_threads = threads;
  wanted_pools = pools;
}

int num_threads() {
  Runtime& rt = runtime();
  std::lock_guard<std::mutex> lock(rt.mutex);
  return rt.pool->threads();
}

}  // namespace kts
