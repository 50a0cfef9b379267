// Fake /proc and /sys trees: machines that this one is not.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "kts/thread_pool.h"
#include "kts/topology.h"

namespace kts::test {
namespace {

// A folder that stands for "/".
class FakeRoot {
 public:
  FakeRoot() : root_(std::filesystem::temp_directory_path() / ("kts_topology_" + std::to_string(getpid()))) {
    std::filesystem::remove_all(root_);
    write("proc/cpuinfo", "processor : 0\nmodel name : Test CPU\n");
  }
  ~FakeRoot() { std::filesystem::remove_all(root_); }
  void write(const std::string& path, const std::string& text) const {
    std::filesystem::create_directories((root_ / path).parent_path());
    std::ofstream(root_ / path) << text;
  }
  void node(int number, const std::string& cpus) const {
    write("sys/devices/system/node/node" + std::to_string(number) + "/cpulist", cpus + "\n");
  }
  void nodes_online(const std::string& list) const { write("sys/devices/system/node/online", list + "\n"); }
  CpuInfo read(const std::vector<int>& mask) const { return read_cpu_info(root_.string() + "/", mask); }

 private:
  std::filesystem::path root_;
};

std::vector<int> range(int first, int last) {
  std::vector<int> all(static_cast<size_t>(last - first + 1));
  std::iota(all.begin(), all.end(), first);
  return all;
}

using Lists = std::vector<std::vector<int>>;

std::vector<int> sizes_of(const std::vector<int>& pool_of, int pools) {
  std::vector<int> sizes;
  for (int p = 0; p < pools; ++p) sizes.push_back(static_cast<int>(std::count(pool_of.begin(), pool_of.end(), p)));
  return sizes;
}

}  // namespace

KTS_TEST(nodes_with_sparse_numbers_without_cpus_and_outside_the_mask) {
  const FakeRoot root;
  root.nodes_online("0,2,5,8");
  root.node(0, "0-3");
  root.node(2, "");  // memory only
  root.node(5, "16-19");
  root.node(8, "4-7");
  const CpuInfo info = root.read({1, 2, 4, 5, 6});
  KTS_EXPECT(info.model_name == "Test CPU") << info.model_name;
  KTS_EXPECT((info.numa_nodes == Lists{{1, 2}, {4, 5, 6}}));
  KTS_EXPECT((info.numa_node_ids == std::vector<int>{0, 8}));
  KTS_EXPECT(info.logical_cpus == 5);
  const auto places = pool_places(info, default_pools(info, 5));
  KTS_EXPECT(places.size() == 2 && places[1].nodes == std::vector<int>{8});
  KTS_EXPECT(default_pools(info, 1) == 1);
}

KTS_TEST(cpus_beyond_1024) {
  const FakeRoot root;
  root.nodes_online("0-1");
  root.node(0, "0-1023");
  root.node(1, "1024-1535,2040");
  const CpuInfo info = root.read(range(1000, 2047));
  KTS_EXPECT(info.numa_nodes.size() == 2 && info.numa_nodes[0].size() == 24 && info.numa_nodes[1].size() == 513);
  KTS_EXPECT(info.logical_cpus == 1048 && max_threads(info) == 1048);
  const std::vector<int> pool_of = spread_threads(100, pool_places(info, 2));
  KTS_EXPECT((sizes_of(pool_of, 2) == std::vector<int>{24, 76}));  // node 0 is full
}

KTS_TEST(cpus_that_are_switched_off_do_not_count) {
  const FakeRoot root;
  root.write("sys/devices/system/cpu/online", "0-1,3\n");
  root.nodes_online("0-1");
  root.node(0, "0-1");
  root.node(1, "2-3");  // old kernels list them there, too
  const CpuInfo info = root.read({0, 1, 2, 3});
  KTS_EXPECT(info.logical_cpus == 3 && (info.numa_nodes == Lists{{0, 1}, {3}}));
}

KTS_TEST(hyperthreads_are_cpus_but_not_cores) {
  const FakeRoot root;
  for (int cpu = 0; cpu < 8; ++cpu) {
    const std::string folder = "sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/";
    root.write(folder + "core_id", std::to_string(cpu % 2) + "\n");
    root.write(folder + "physical_package_id", std::to_string(cpu / 2 % 2) + "\n");
  }
  const CpuInfo info = root.read(range(0, 7));
  KTS_EXPECT(info.physical_cores == 4 && default_threads(info) == 4 && max_threads(info) == 8);
  KTS_EXPECT(info.numa_nodes.size() == 1 && info.numa_node_ids == std::vector<int>{-1});  // no node folder at all
}

KTS_TEST(the_quota_limits_threads) {
  const FakeRoot root;
  root.write("proc/self/cgroup", "0::/a/b\n");
  root.write("sys/fs/cgroup/a/cpu.max", "150000 100000\n");
  root.write("sys/fs/cgroup/a/b/cpu.max", "max 100000\n");
  CpuInfo info = root.read(range(0, 7));
  KTS_EXPECT(info.quota_cpus == 1.5) << info.quota_cpus;
  KTS_EXPECT(default_threads(info) == 1 && max_threads(info) == 1);
  root.write("sys/fs/cgroup/a/cpu.max", "50000 100000\n");
  info = root.read(range(0, 7));
  KTS_EXPECT(info.quota_cpus == 0.5 && default_threads(info) == 1 && max_threads(info) == 1);
  root.write("proc/self/cgroup", "4:cpu,cpuacct:/x\n");
  root.write("sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_quota_us", "300000\n");
  root.write("sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_period_us", "100000\n");
  info = root.read(range(0, 7));
  KTS_EXPECT(info.quota_cpus == 3.0 && max_threads(info) == 3 && default_threads(info) == 3);
}

KTS_TEST(damaged_lists_are_survived) {
  const FakeRoot root;
  root.nodes_online("x,0,-3,1-99999999999999999999");
  root.node(0, "0-1,,garbage,3-2");
  const CpuInfo info = root.read({0, 1, 2});
  KTS_EXPECT((info.numa_nodes == Lists{{0, 1}}));
}

KTS_TEST(fewer_pools_than_nodes_share_all_nodes) {
  CpuInfo info;
  for (int node = 0; node < 5; ++node) {
    info.numa_nodes.push_back(range(node * 4, node * 4 + 3));
    info.numa_node_ids.push_back(node * 2);
  }
  const auto places = pool_places(info, 2);
  KTS_EXPECT((places[0].nodes == std::vector<int>{0, 2, 4} && places[1].nodes == std::vector<int>{6, 8}));
  KTS_EXPECT(places[0].cpus == range(0, 11) && places[1].cpus == range(12, 19));
  const auto one = pool_places(info, 1);
  KTS_EXPECT(one[0].nodes.size() == 5 && one[0].cpus.size() == 20);
}

KTS_TEST(threads_are_spread_evenly_over_pools) {
  for (int pools = 1; pools <= 9; ++pools)
    for (int threads = 1; threads <= 40; ++threads) {
      const std::vector<PoolPlace> places(static_cast<size_t>(pools));
      const std::vector<int> pool_of = spread_threads(threads, places);
      const std::vector<int> sizes = sizes_of(pool_of, pools);
      const auto [low, high] = std::minmax_element(sizes.begin(), sizes.end());
      KTS_EXPECT(*high - *low <= 1 && std::accumulate(sizes.begin(), sizes.end(), 0) == threads)
          << threads << " threads, " << pools << " pools";
      KTS_EXPECT(std::is_sorted(pool_of.begin(), pool_of.end()) && pool_of[0] == 0);
    }
  const std::vector<PoolPlace> narrow = {{range(0, 7), {}}, {range(8, 9), {}}};
  KTS_EXPECT((sizes_of(spread_threads(10, narrow), 2) == std::vector<int>{8, 2}));
  KTS_EXPECT((sizes_of(spread_threads(12, narrow), 2) == std::vector<int>{8, 4}));  // tests: more threads than CPUs
}

KTS_TEST(a_thread_is_never_bound_outside_its_affinity_mask) {
  const std::vector<int> mask = affinity_cpus();
  if (mask.size() < 2) KTS_SKIP("one CPU");
  std::vector<int> widened, elsewhere;
  std::thread([&] {
    bind_to_cpus({mask[0]});
    bind_to_cpus(mask);
    widened = affinity_cpus();
    bind_to_cpus({mask[1], 5000});
    elsewhere = affinity_cpus();
  }).join();
  KTS_EXPECT(widened == std::vector<int>{mask[0]} && elsewhere == std::vector<int>{mask[0]});
}

KTS_TEST(memory_is_placed_on_whole_pages_and_stays_usable) {
  const CpuInfo info = read_cpu_info();
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), bytes = 8 * page;
  void* mapped = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  char* memory = static_cast<char*>(mapped);
  KTS_EXPECT(!place_on_nodes(memory + 1, page, info.numa_node_ids));  // not one whole page
  KTS_EXPECT(!place_on_nodes(memory, bytes, {}));
  KTS_EXPECT(!place_on_nodes(memory, bytes, {1000000}));  // no such node: refused, not fatal
  if (info.numa_node_ids[0] >= 0 && !place_on_nodes(memory + 5, bytes - 5, info.numa_node_ids))
    KTS_SKIP("the system refuses mbind here");
  std::fill(memory, memory + bytes, 'x');
  KTS_EXPECT(std::count(memory, memory + bytes, 'x') == static_cast<long>(bytes));
  munmap(mapped, bytes);
  ThreadPool pool(2, std::vector<PoolPlace>{{{}, {0}}, {{}, {}}});
  KTS_EXPECT(pool.node_of(0) == 0 && pool.node_of(1) == -1);
}

}  // namespace kts::test
