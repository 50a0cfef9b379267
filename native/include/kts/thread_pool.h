// The library's own workers. No OpenMP: torch brings its own runtime and two of them spin against each other.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>

namespace kts {

class ThreadPool {
 public:
  // `threads` includes the caller. With several pools workers are bound to the CPUs of NUMA node (index * pools /
  // threads); the caller never is.
  ThreadPool(int threads, int pools);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const;

  // Runs fn(task, thread) for every task in [0, tasks); returns when all are done. The first exception is rethrown here
  // and the tasks that had not started are dropped. Not reentrant.
  void parallel_for(int64_t tasks, const std::function<void(int64_t task, int thread)>& fn);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// The process-wide pool and the lock that one forward or backward holds while it runs. After fork() the child gets a
// new pool.
struct Runtime {
  std::mutex mutex;
  std::unique_ptr<ThreadPool> pool;
};
Runtime& runtime();

void set_threads(int threads, int pools);
int num_threads();

}  // namespace kts
