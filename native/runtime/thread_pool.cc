// Workers sit in groups. A group's epoch counts jobs: workers wait for it to change (spin ~50 us, then futex). The gate
// counts the workers inside the current job: the caller opens it, works too, closes it when no task is left and waits
// for those inside. A worker that comes late finds it closed, so a job never waits for a thread that the system has not
// woken yet. The caller wakes one sleeper per group and that one wakes the rest, so many threads start in two short
// steps and not one after the other.
// Idle workers cost nothing: torch's own threads get the cores between our calls.
#include "kts/thread_pool.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <climits>
#include <exception>
#include <optional>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>

#include "kts/base.h"

namespace kts {

namespace {

constexpr int kGroupWorkers = 8;
constexpr auto kSpin = std::chrono::microseconds(50);  // a futex wake-up costs about that much
constexpr uint32_t kClosed = 1u << 31;
constexpr uint32_t kCallerSleeps = 1u << 30;
constexpr uint32_t kInside = kCallerSleeps - 1;

std::atomic<void (*)()> phase_end{nullptr};

void end_phase() {
  if (void (*hook)() = phase_end.load(std::memory_order_acquire)) hook();
}

void futex_wait(const std::atomic<uint32_t>& word, uint32_t value) {
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);  // may return early: callers loop
}
void futex_wake(const std::atomic<uint32_t>& word, int count) {
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, count, nullptr, nullptr, 0);
}

// False: `done` was not true within kSpin.
template <class Done>
bool spin_until(const Done& done) {
  const auto until = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 32; ++i) {
      if (done()) return true;
      __builtin_ia32_pause();
    }
  } while (std::chrono::steady_clock::now() < until);
  return done();
}

struct Group {
  alignas(64) std::atomic<uint32_t> epoch{0};
  std::atomic<uint32_t> sleepers{0};
  alignas(64) std::atomic<uint32_t> gate{kClosed};

  // Updates `seen`; true: slept in between.
  bool wait_for_job(uint32_t& seen) {
    const auto changed = [&] { return epoch.load(std::memory_order_acquire) != seen; };
    const bool sleeps = !spin_until(changed);
    if (sleeps) {
      sleepers.fetch_add(1);  // before the check in futex_wait(), as announce() counts sleepers after its change
      while (!changed()) futex_wait(epoch, seen);
      sleepers.fetch_sub(1);
    }
    seen = epoch.load(std::memory_order_acquire);
    return sleeps;
  }

  void announce(int wake) {
    epoch.fetch_add(1);
    if (sleepers.load() > 0) futex_wake(epoch, wake);
  }

  bool enter() {
    if ((gate.fetch_add(1, std::memory_order_acq_rel) & kClosed) == 0) return true;
    leave();
    return false;
  }

  void leave() {
    const uint32_t before = gate.fetch_sub(1, std::memory_order_acq_rel);
    if ((before & kInside) == 1 && (before & kCallerSleeps)) futex_wake(gate, 1);
  }

  void open() { gate.fetch_and(~(kClosed | kCallerSleeps), std::memory_order_acq_rel); }
  void close() { gate.fetch_or(kClosed, std::memory_order_acq_rel); }
  void wait_until_empty() {
    const auto empty = [&] { return (gate.load(std::memory_order_acquire) & kInside) == 0; };
    if (spin_until(empty)) return;
    for (;;) {
      const uint32_t value = gate.fetch_or(kCallerSleeps, std::memory_order_acq_rel) | kCallerSleeps;
      if ((value & kInside) == 0) return;
      futex_wait(gate, value);
    }
  }
};

struct alignas(64) TaskList {
  std::atomic<int64_t> next{0};
  int64_t tasks = 0;
};

}  // namespace

struct ThreadPool::State {
  using Task = FunctionRef<void(int pool, int64_t task, int thread)>;

  State(int threads, std::vector<PoolPlace> pool_places)
      : places(std::move(pool_places)),
        pool_of(spread_threads(threads, places)),
        groups(static_cast<size_t>(ceil_div(threads - 1, kGroupWorkers))),
        lists(places.size()) {}

  const std::vector<PoolPlace> places;
  const std::vector<int> pool_of;
  std::vector<Group> groups;
  std::vector<std::thread> workers;
  std::atomic<bool> ends{false};
  // The job: written while every gate is closed and nobody is inside.
  std::vector<TaskList> lists;
  int num_lists = 0;
  std::optional<Task> fn;
  std::atomic<bool> failed{false};
  std::exception_ptr error;

  void work(int thread) {
    const int home = pool_of[static_cast<size_t>(thread)];
    for (int i = 0; i < num_lists; ++i) {
      const int pool = (home + i) % num_lists;
      TaskList& list = lists[static_cast<size_t>(pool)];
      while (!failed.load(std::memory_order_relaxed)) {
        const int64_t task = list.next.fetch_add(1, std::memory_order_relaxed);
        if (task >= list.tasks) break;
        try {
          (*fn)(pool, task, thread);
        } catch (...) {
          if (!failed.exchange(true)) error = std::current_exception();
        }
      }
    }
    end_phase();
  }

  void worker_main(int thread) {
    if (places.size() > 1) bind_to_cpus(places[static_cast<size_t>(pool_of[static_cast<size_t>(thread)])].cpus);
    Group& group = groups[static_cast<size_t>((thread - 1) / kGroupWorkers)];
    uint32_t seen = 0;
    for (;;) {
      const bool slept = group.wait_for_job(seen);
      if (ends.load()) return;
      if (!group.enter()) continue;
      if (slept && group.sleepers.load() > 0) futex_wake(group.epoch, INT_MAX);
      work(thread);
      group.leave();
    }
  }

  void set_list(int list, int64_t tasks) {
    lists[static_cast<size_t>(list)].tasks = tasks;
    lists[static_cast<size_t>(list)].next.store(0, std::memory_order_relaxed);
  }

  void run(int64_t tasks, Task task) {
    if (tasks <= 0) return;
    fn = task;
    failed = false;
    const bool alone = tasks == 1 || workers.empty();
    if (!alone) {
      for (Group& group : groups) group.open();
      for (Group& group : groups) group.announce(1);
    }
    work(0);
    if (!alone) {
      for (Group& group : groups) group.close();
      for (Group& group : groups) group.wait_until_empty();
    }
    if (failed) std::rethrow_exception(std::exchange(error, nullptr));
  }

  void join() {
    ends = true;
    for (Group& group : groups) group.announce(INT_MAX);
    for (std::thread& worker : workers) worker.join();
  }
};

namespace {
std::vector<PoolPlace> places_here(int pools) {
  const CpuInfo info = read_cpu_info();
  KTS_CHECK(pools >= 1 && pools <= static_cast<int>(info.numa_nodes.size()),
            "threadpool_count: expected 1 up to the number of NUMA nodes of this machine");
  return pool_places(info, pools);
}
}  // namespace

ThreadPool::ThreadPool(int threads, int pools) : ThreadPool(threads, places_here(pools)) {}

ThreadPool::ThreadPool(int threads, std::vector<PoolPlace> places) {
  KTS_CHECK(threads >= 1, "threads: expected at least 1");
  KTS_CHECK(!places.empty(), "threadpool_count: expected at least 1");
  state_ = std::make_unique<State>(threads, std::move(places));
  state_->workers.reserve(static_cast<size_t>(threads));
  try {
    for (int i = 1; i < threads; ++i)
      state_->workers.emplace_back([state = state_.get(), i] { state->worker_main(i); });
  } catch (const std::system_error& error) {
    const size_t started = state_->workers.size();
    state_->join();
    throw std::runtime_error("threads: the system started " + std::to_string(started) + " of " +
                             std::to_string(threads - 1) + " workers (" + error.what() + "); ask for fewer");
  }
}

ThreadPool::~ThreadPool() { state_->join(); }

int ThreadPool::threads() const { return static_cast<int>(state_->workers.size()) + 1; }
int ThreadPool::pools() const { return static_cast<int>(state_->places.size()); }
int ThreadPool::pool_of(int thread) const { return state_->pool_of[static_cast<size_t>(thread)]; }

int ThreadPool::node_of(int pool) const {
  const std::vector<int>& nodes = state_->places[static_cast<size_t>(pool)].nodes;
  return nodes.empty() ? -1 : nodes.front();
}

void ThreadPool::place(void* memory, size_t bytes, int pool) const {
  place_on_nodes(memory, bytes, state_->places[static_cast<size_t>(pool)].nodes);
}

void ThreadPool::parallel_for(int64_t tasks, FunctionRef<void(int64_t, int)> fn) {
  state_->num_lists = 1;
  state_->set_list(0, tasks);
  state_->run(tasks, [fn](int, int64_t task, int thread) { fn(task, thread); });
}

void ThreadPool::parallel_for_pools(const int64_t* tasks, FunctionRef<void(int, int64_t, int)> fn) {
  int64_t all = 0;
  state_->num_lists = pools();
  for (int pool = 0; pool < pools(); ++pool) {
    state_->set_list(pool, tasks[pool]);
    all += tasks[pool] > 0 ? tasks[pool] : 0;
  }
  state_->run(all, fn);
}

void set_phase_end(void (*hook)()) { phase_end.store(hook, std::memory_order_release); }

}  // namespace kts
