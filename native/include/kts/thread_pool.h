// The library's own workers. No OpenMP: torch brings its own runtime and two of them spin against each other.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <type_traits>
#include <vector>

#include "kts/topology.h"

namespace kts {

// A callable that outlives the call it is passed to. std::function would copy captures of more than 16 bytes to the
// heap, once per parallel section.
template <class Signature>
class FunctionRef;

template <class... Args>
class FunctionRef<void(Args...)> {
 public:
  template <class F, class = std::enable_if_t<!std::is_same_v<std::decay_t<F>, FunctionRef>>>
  FunctionRef(F&& f)  // NOLINT: implicit, so that lambdas can be passed
      : object_(const_cast<void*>(static_cast<const void*>(&f))),
        call_([](void* object, Args... args) { (*static_cast<std::remove_reference_t<F>*>(object))(args...); }) {}
  void operator()(Args... args) const { call_(object_, args...); }

 private:
  void* object_;
  void (*call_)(void*, Args...);
};

class ThreadPool {
 public:
  // `threads` includes the caller, who is thread 0. Pools share the NUMA nodes of this machine (topology.h); with
  // several pools workers are bound to the CPUs of their pool; the caller never is.
  ThreadPool(int threads, int pools);
  // Tests: pools wherever they say.
  ThreadPool(int threads, std::vector<PoolPlace> places);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const;
  int pools() const;
  int pool_of(int thread) const;
  // First NUMA node of the pool as the system numbers it; -1 = unknown.
  int node_of(int pool) const;

  // Runs fn(task, thread) for every task in [0, tasks); returns when all are done. The first exception is rethrown here
  // and the tasks that had not started are dropped. Not reentrant. A worker that wakes up too late is not waited for.
  void parallel_for(int64_t tasks, FunctionRef<void(int64_t task, int thread)> fn);

  // The same for tasks[pool] tasks of every pool: a thread takes those of its own pool, whose memory is near, before it
  // helps the others.
  void parallel_for_pools(const int64_t* tasks, FunctionRef<void(int pool, int64_t task, int thread)> fn);

  // Pages that are first written after this lie near the pool's threads (place_on_nodes). One range per pool and
  // buffer, multiples of 2 MiB: every change of policy splits the mapping, and no huge page crosses a split.
  void place(void* memory, size_t bytes, int pool) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// Runs on every thread that took part in a parallel section when it leaves it; process-wide, null = nothing.
void set_phase_end(void (*hook)());

// The process-wide pool and the lock that one forward or backward holds while it runs. After fork() the child gets a
// new pool.
struct Runtime {
  std::mutex mutex;
  std::unique_ptr<ThreadPool> pool;
};
Runtime& runtime();

// Replaces the process-wide pool. `threads` beyond max_threads() are not started: num_threads() tells. `pools`: 1 up to
// the number of NUMA nodes, 0 = that number; never more than threads. Waits for a running forward or backward.
// `fake_nodes` is for tests: up to 1024 threads and pools, which share this machine's CPUs.
void set_threads(int threads, int pools = 0, bool fake_nodes = false);
int num_threads();
int num_pools();

// Of the process-wide pool; the caller holds Runtime::mutex.
void place_on_pool(void* memory, size_t bytes, int pool);
int node_of_pool(int pool);

}  // namespace kts
