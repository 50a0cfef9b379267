// The process-wide pool: made at the first use, replaced by set_threads(), made again in a forked child.
#include <pthread.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <utility>

#include "kts/base.h"
#include "kts/thread_pool.h"
#include "kts/topology.h"

namespace kts {

namespace {

struct Wanted {
  int threads = 0;  // 0: default
  int pools = 0;    // 0: default
  bool fake_nodes = false;
};
Wanted wanted;
constexpr int kMostFake = 1024;  // threads and pools

// After fork() the child has none of the workers and may have inherited a locked mutex: it starts over with a fresh
// runtime, and the parent's is leaked on purpose (its destructor would join threads that do not exist).
Runtime* current = nullptr;

std::unique_ptr<ThreadPool> make_pool(const Wanted& want) {
  KTS_CHECK(want.pools >= 0, "threadpool_count: expected at least 1");
  if (want.fake_nodes) {
    KTS_CHECK(want.threads <= kMostFake && want.pools <= kMostFake,
              "fake_nodes: expected at most 1024 threads and pools");
    const size_t pools = static_cast<size_t>(std::max(want.pools, 1));
    return std::make_unique<ThreadPool>(want.threads, std::vector<PoolPlace>(pools));
  }
  const CpuInfo info = read_cpu_info();
  KTS_CHECK(want.pools <= static_cast<int>(info.numa_nodes.size()),
            "threadpool_count: expected 1 up to the number of NUMA nodes of this machine");
  const int threads = want.threads == 0 ? default_threads(info) : std::min(want.threads, max_threads(info));
  const int pools = want.pools == 0 ? default_pools(info, threads) : std::min(want.pools, threads);
  return std::make_unique<ThreadPool>(threads, pool_places(info, pools));
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
    current = new Runtime;
    current->pool = make_pool(wanted);
  }
  return *current;
}

void set_threads(int threads, int pools, bool fake_nodes) {
  KTS_CHECK(threads >= 1, "threads: expected at least 1");
  const Wanted want{threads, pools, fake_nodes};
  auto pool = make_pool(want);
  Runtime& rt = runtime();
  std::lock_guard<std::mutex> lock(rt.mutex);
  rt.pool = std::move(pool);
  wanted = want;
}

int num_threads() {
  Runtime& rt = runtime();
  std::lock_guard<std::mutex> lock(rt.mutex);
  return rt.pool->threads();
}

int num_pools() {
  Runtime& rt = runtime();
  std::lock_guard<std::mutex> lock(rt.mutex);
  return rt.pool->pools();
}

void place_on_pool(void* memory, size_t bytes, int pool) { runtime().pool->place(memory, bytes, pool); }
int node_of_pool(int pool) { return runtime().pool->node_of(pool); }

}  // namespace kts
