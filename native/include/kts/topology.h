// What the machine offers, read from /proc, /sys and the affinity mask, and how pools of threads are laid over it.
#pragma once
#include <cstddef>
#include <string>
#include <vector>

namespace kts {

struct CpuInfo {
  std::string model_name;
  int logical_cpus = 0;                      // in the affinity mask
  int physical_cores = 0;                    // distinct cores in the affinity mask
  double quota_cpus = 0.0;                   // cgroup CPU quota; 0 = none
  std::vector<std::vector<int>> numa_nodes;  // CPUs of the affinity mask per node; nodes without one are left out
  std::vector<int> numa_node_ids;            // the system's number of each; -1 = unknown
};

// `root` is "/" but for tests; `cpus` stands for the affinity mask.
CpuInfo read_cpu_info(const std::string& root = "/");
CpuInfo read_cpu_info(const std::string& root, const std::vector<int>& cpus);

// CPUs that the calling thread may run on, any number of them.
std::vector<int> affinity_cpus();

// Whole CPUs of the affinity mask and the cgroup quota, at least 1: more threads would only wait for each other.
int max_threads(const CpuInfo& info);
// Distinct cores in the affinity mask, capped by the cgroup quota, at least 1.
int default_threads(const CpuInfo& info);
// One pool per NUMA node, but not more pools than threads.
int default_pools(const CpuInfo& info, int threads);

// Where one pool of threads runs and keeps its memory.
struct PoolPlace {
  std::vector<int> cpus;   // empty: wherever the process may run
  std::vector<int> nodes;  // empty: wherever the system puts it
};

// Every pool gets its share of the nodes, in order; with fewer pools than nodes a pool spans several.
std::vector<PoolPlace> pool_places(const CpuInfo& info, int pools);

// Pool of each thread, ascending: sizes differ by at most one, except that no pool gets more threads than its CPUs
// while another has room.
std::vector<int> spread_threads(int threads, const std::vector<PoolPlace>& places);

// The calling thread runs on `cpus` from now on, never outside its present affinity mask. Best effort.
void bind_to_cpus(const std::vector<int>& cpus);

// Whole pages inside [memory, memory + bytes) will lie on `nodes` when first written: on the one node as long as it has
// room, or spread over several in turn. Best effort; true if the system agreed.
bool place_on_nodes(void* memory, size_t bytes, const std::vector<int>& nodes);

}  // namespace kts
