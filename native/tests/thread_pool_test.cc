#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <vector>

#include "check.h"
#include "kts/thread_pool.h"
#include "kts/topology.h"

namespace kts::test {

KTS_TEST(every_task_runs_once) {
  for (const int threads : {1, 2, 3, 5}) {
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

KTS_TEST(an_exception_reaches_the_caller_and_the_pool_lives_on) {
  ThreadPool pool(3, 1);
  for (int round = 0; round < 20; ++round) {
    bool caught = false;
    try {
      pool.parallel_for(100, [](int64_t task, int) {
        if (task == 17) throw std::runtime_error("seventeen");
      });
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
  ThreadPool pool(4, 1);
  std::atomic<int64_t> sum{0};
  for (int i = 0; i < 3000; ++i) pool.parallel_for(4, [&](int64_t task, int) { sum += task; });
  KTS_EXPECT(sum == 3000 * 6);
}

KTS_TEST(a_forked_child_gets_its_own_pool) {
  set_threads(2, 1);
  std::atomic<int> before{0};
  runtime().pool->parallel_for(8, [&](int64_t, int) { ++before; });
  const pid_t child = fork();
  if (child == 0) {
    std::atomic<int> count{0};
    runtime().pool->parallel_for(8, [&](int64_t, int) { ++count; });
    _exit(count == 8 && num_threads() == 2 ? 0 : 1);
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

namespace {
void write(const std::filesystem::path& path, const std::string& text) {
  std::filesystem::create_directories(path.parent_path());
  std::ofstream(path) << text;
}
}  // namespace

KTS_TEST(topology_reads_quota_and_nodes_from_a_fake_root) {
  const auto root = std::filesystem::temp_directory_path() / ("kts_topology_" + std::to_string(getpid()));
  const CpuInfo real = read_cpu_info();
  const std::string first = std::to_string(real.numa_nodes[0][0]);
  write(root / "proc/cpuinfo", "processor : 0\nmodel name : Test CPU\n");
  write(root / "proc/self/cgroup", "0::/a/b\n");
  write(root / "sys/fs/cgroup/a/cpu.max", "150000 100000\n");
  write(root / "sys/fs/cgroup/a/b/cpu.max", "max 100000\n");
  write(root / "sys/devices/system/node/online", "0-1\n");
  write(root / "sys/devices/system/node/node0/cpulist", first + "\n");
  write(root / "sys/devices/system/node/node1/cpulist", "900-901\n");
  const CpuInfo info = read_cpu_info(root.string() + "/");
  KTS_EXPECT(info.model_name == "Test CPU") << info.model_name;
  KTS_EXPECT(info.quota_cpus == 1.5) << info.quota_cpus;
  KTS_EXPECT(info.numa_nodes.size() == 1 && info.numa_nodes[0].size() == 1);  // node 1 has no CPU of this process
  KTS_EXPECT(default_threads(info) == 1);
  write(root / "proc/self/cgroup", "4:cpu,cpuacct:/x\n");
  write(root / "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_quota_us", "300000\n");
  write(root / "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_period_us", "100000\n");
  KTS_EXPECT(read_cpu_info(root.string() + "/").quota_cpus == 3.0);
  std::filesystem::remove_all(root);
}

}  // namespace kts::test
