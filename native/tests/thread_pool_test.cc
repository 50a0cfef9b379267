#include <sched.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "kts/thread_pool.h"
#include "kts/topology.h"

namespace kts::test {
namespace {

std::vector<PoolPlace> unbound(int pools) { return std::vector<PoolPlace>(static_cast<size_t>(pools)); }

std::atomic<int> phase_ends{0};
void count_phase_end() { ++phase_ends; }

// Restores the default pool, whatever the test did to it.
struct RestoreThreads {
  const int before = num_threads();
  ~RestoreThreads() { set_threads(before, 1); }
};

}  // namespace

KTS_TEST(every_task_runs_once) {
  for (const int threads : {1, 2, 3, 5, 19}) {
    ThreadPool pool(threads, 1);
    KTS_EXPECT(pool.threads() == threads);
    for (const int64_t tasks : {0, 1, 2, 7, 1000}) {
      std::vector<std::atomic<int>> counts(static_cast<size_t>(tasks));
      std::atomic<bool> thread_ok{true};
      pool.parallel_for(tasks, [&](int64_t task, int thread) {
        if (thread < 0 || thread >= threads) thread_ok = false;
        ++counts[static_cast<size_t>(task)];
      });
      KTS_EXPECT(thread_ok.load());
      for (const auto& count : counts) KTS_EXPECT(count == 1) << "threads=" << threads << " tasks=" << tasks;
    }
  }
}

KTS_TEST(every_task_of_every_pool_runs_once) {
  for (const int pools : {1, 2, 3, 5})
    for (const int threads : {1, 2, 3, 4, 7, 12}) {
      ThreadPool pool(threads, unbound(pools));
      KTS_EXPECT(pool.pools() == pools && pool.threads() == threads);
      for (int round = 0; round < 20; ++round) {
        const std::array<int64_t, 5> tasks = {round % 3, round * 5 % 7, 0, 40, 1};
        std::array<std::array<std::atomic<int>, 40>, 5> counts{};
        pool.parallel_for_pools(tasks.data(), [&](int p, int64_t task, int thread) {
          if (thread >= 0 && thread < threads) ++counts[static_cast<size_t>(p)][static_cast<size_t>(task)];
        });
        for (size_t p = 0; p < 5; ++p)
          for (size_t t = 0; t < 40; ++t) {
            const bool there = p < static_cast<size_t>(pools) && static_cast<int64_t>(t) < tasks[p];
            KTS_EXPECT(counts[p][t] == (there ? 1 : 0))
                << "pools=" << pools << " threads=" << threads << " pool " << p << " task " << t;
          }
      }
    }
}

KTS_TEST(threads_take_tasks_of_their_own_pool_first) {
  constexpr int kThreads = 6, kPools = 3;
  ThreadPool pool(kThreads, unbound(kPools));
  const std::array<int64_t, kPools> tasks = {2, 2, 2};  // as many as the pool has threads
  // All threads meet in their first task: nobody is free to help before everybody has one.
  std::atomic<int> arrived{0}, strangers{0};
  pool.parallel_for_pools(tasks.data(), [&](int p, int64_t, int thread) {
    if (pool.pool_of(thread) != p) ++strangers;
    ++arrived;
    while (arrived < kThreads) std::this_thread::yield();
  });
  KTS_EXPECT(strangers == 0);
  // And with work in one pool only, all threads come to help.
  const std::array<int64_t, kPools> uneven = {0, kThreads, 0};
  arrived = 0;
  pool.parallel_for_pools(uneven.data(), [&](int p, int64_t, int) {
    if (p != 1) ++strangers;
    ++arrived;
    while (arrived < kThreads) std::this_thread::yield();
  });
  KTS_EXPECT(strangers == 0 && arrived == kThreads);
}

KTS_TEST(an_exception_reaches_the_caller_and_the_pool_lives_on) {
  ThreadPool pool(3, unbound(2));
  for (int round = 0; round < 20; ++round) {
    bool caught = false;
    try {
      const auto fails = [](int64_t task) {
        if (task == 17) throw std::runtime_error("seventeen");
      };
      const std::array<int64_t, 2> tasks = {18, 50};
      if (round % 2 == 0)
        pool.parallel_for(100, [&](int64_t task, int) { fails(task); });
      else
        pool.parallel_for_pools(tasks.data(), [&](int, int64_t task, int) { fails(task); });
    } catch (const std::runtime_error& error) {
      caught = std::string(error.what()) == "seventeen";
    }
    KTS_EXPECT(caught);
    std::atomic<int> sum{0};
    pool.parallel_for(10, [&](int64_t task, int) { sum += static_cast<int>(task); });
    KTS_EXPECT(sum == 45);
  }
}

KTS_TEST(many_short_jobs_lose_no_wakeup) {
  for (const int threads : {2, 4, 11}) {
    ThreadPool pool(threads, 1);
    std::atomic<int64_t> sum{0};
    for (int i = 0; i < 3000; ++i) {
      pool.parallel_for(4, [&](int64_t task, int) { sum += task; });
      if (i % 300 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));  // the workers fall asleep
    }
    KTS_EXPECT(sum == 3000 * 6);
  }
}

KTS_TEST(sleeping_workers_are_woken) {
  constexpr int kThreads = 19;  // more than two groups
  ThreadPool pool(kThreads, 1);
  for (int round = 0; round < 5; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    std::atomic<int> arrived{0};
    pool.parallel_for(kThreads, [&](int64_t, int) {
      ++arrived;
      while (arrived < kThreads) std::this_thread::yield();  // would wait for ever for a worker that sleeps on
    });
    KTS_EXPECT(arrived == kThreads);
  }
}

KTS_TEST(the_phase_end_runs_on_every_thread_that_took_part) {
  constexpr int kThreads = 3;
  ThreadPool pool(kThreads, unbound(2));
  const auto all_meet = [&] {
    std::atomic<int> arrived{0};
    pool.parallel_for(kThreads, [&](int64_t, int) {
      ++arrived;
      while (arrived < kThreads) std::this_thread::yield();
    });
  };
  set_phase_end(&count_phase_end);
  phase_ends = 0;
  all_meet();
  KTS_EXPECT(phase_ends == kThreads) << phase_ends.load();
  pool.parallel_for(1, [](int64_t, int) {});  // the caller alone
  KTS_EXPECT(phase_ends == kThreads + 1) << phase_ends.load();
  try {
    pool.parallel_for(1, [](int64_t, int) { throw std::runtime_error("x"); });
  } catch (const std::runtime_error&) {
  }
  KTS_EXPECT(phase_ends == kThreads + 2) << phase_ends.load();
  set_phase_end(nullptr);
  all_meet();
  KTS_EXPECT(phase_ends == kThreads + 2);
}

KTS_TEST(workers_are_bound_to_their_pool_and_the_caller_is_not) {
  const std::vector<int> mask = affinity_cpus();
  std::vector<PoolPlace> places;
  for (size_t p = 0; p < 2; ++p) places.push_back({{mask[p % mask.size()], 100000}, {}});  // no such CPU: left out
  ThreadPool pool(4, places);
  std::atomic<int> arrived{0}, wrong{0};
  pool.parallel_for(4, [&](int64_t, int thread) {
    const std::vector<int> want{mask[static_cast<size_t>(pool.pool_of(thread)) % mask.size()]};
    if (affinity_cpus() != (thread == 0 ? mask : want)) ++wrong;
    ++arrived;
    while (arrived < 4) std::this_thread::yield();
  });
  KTS_EXPECT(wrong == 0) << wrong.load();
}

KTS_TEST(users_get_no_more_threads_than_cpus_and_no_more_pools_than_nodes) {
  const RestoreThreads restore;
  const CpuInfo info = read_cpu_info();
  set_threads(5000);
  KTS_EXPECT(num_threads() == max_threads(info)) << num_threads();
  KTS_EXPECT(num_pools() == default_pools(info, num_threads()));
  set_threads(1);
  KTS_EXPECT(num_threads() == 1 && num_pools() == 1);
  for (const auto& [threads, pools] : {std::pair{2, 999}, std::pair{0, 1}, std::pair{2, -1}}) {
    bool refused = false;
    try {
      set_threads(threads, pools);
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    KTS_EXPECT(refused) << threads << " " << pools;
  }
  set_threads(3, 2, true);
  KTS_EXPECT(num_threads() == 3 && num_pools() == 2 && node_of_pool(1) == -1);
  set_threads(1, 4, true);
  KTS_EXPECT(num_threads() == 1 && num_pools() == 4);
}

KTS_TEST(a_forked_child_gets_its_own_pool) {
#if defined(__SANITIZE_THREAD__)
  KTS_SKIP("thread sanitizer allows no threads in a forked child");
#endif
  const RestoreThreads restore;
  set_threads(2, 2, true);
  std::atomic<int> before{0};
  runtime().pool->parallel_for(8, [&](int64_t, int) { ++before; });
  const pid_t child = fork();
  if (child == 0) {
    std::atomic<int> count{0};
    runtime().pool->parallel_for(8, [&](int64_t, int) { ++count; });
    _exit(count == 8 && num_threads() == 2 && num_pools() == 2 ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  KTS_EXPECT(WIFEXITED(status) && WEXITSTATUS(status) == 0) << "status " << status;
}

KTS_TEST(too_many_threads_are_an_error_and_not_the_end_of_the_process) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  KTS_SKIP("sanitizers need more address space than the limit of this test");
#endif
  const pid_t child = fork();
  if (child == 0) {
    const rlimit limit{1ull << 30, 1ull << 30};  // of address space: some of the workers get no stack
    setrlimit(RLIMIT_AS, &limit);
    try {
      ThreadPool pool(5000, 1);
      _exit(1);
    } catch (const std::runtime_error& error) {
      _exit(std::string(error.what()).find("ask for fewer") != std::string::npos ? 0 : 2);
    }
  }
  int status = 0;
  waitpid(child, &status, 0);
  KTS_EXPECT(WIFEXITED(status) && WEXITSTATUS(status) == 0) << "status " << status;
}

}  // namespace kts::test
