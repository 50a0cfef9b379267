// What the machine offers, read from /proc, /sys and the affinity mask.
#pragma once
#include <string>
#include <vector>

namespace kts {

struct CpuInfo {
  std::string model_name;
  int logical_cpus = 0;                      // in the affinity mask
  int physical_cores = 0;                    // distinct cores in the affinity mask
  double quota_cpus = 0.0;                   // cgroup CPU quota; 0 = none
  std::vector<std::vector<int>> numa_nodes;  // CPUs of the affinity mask per node; nodes without one are left out
};

// `root` is "/" but for tests.
CpuInfo read_cpu_info(const std::string& root = "/");

// Distinct cores in the affinity mask, capped by the cgroup quota, at least 1.
int default_threads(const CpuInfo& info);

}  // namespace kts
