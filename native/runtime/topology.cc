#include "kts/topology.h"

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <set>
#include <sstream>
#include <utility>

namespace kts {

namespace {

std::string read_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

constexpr int kMaxCpus = 1 << 16;  // of a damaged list

// "0-3,8,10-11" -> numbers of CPUs or nodes; anything else is skipped.
std::vector<int> parse_cpu_list(const std::string& text) {
  std::vector<int> cpus;
  std::istringstream parts(text);
  for (std::string part; std::getline(parts, part, ',');) {
    int first = -1, last = -1;
    char dash = 0;
    std::istringstream range(part);
    if (!(range >> first) || first < 0) continue;
    last = range >> dash >> last && dash == '-' ? last : first;
    for (int cpu = first; cpu <= last && cpu < kMaxCpus; ++cpu) cpus.push_back(cpu);
  }
  return cpus;
}

// The smallest quota between this process's cgroup and the root of the hierarchy, in CPUs; 0 = none.
double cgroup_quota(const std::string& root) {
  double best = 0.0;
  const auto take = [&best](double quota, double period) {
    if (quota > 0 && period > 0 && (best == 0.0 || quota / period < best)) best = quota / period;
  };
  std::ifstream groups(root + "proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const bool v1 = controllers.find("cpu,") != std::string::npos || controllers == "cpu" ||
                    controllers.find(",cpu") != std::string::npos;
    if (!controllers.empty() && !v1) continue;
    const std::string base = root + "sys/fs/cgroup" + (controllers.empty() ? "" : "/" + controllers);
    std::string group = line.substr(second + 1);
    for (;;) {
      const std::string folder = base + (group == "/" ? "" : group);
      if (controllers.empty()) {
        std::istringstream values(read_line(folder + "/cpu.max"));
        double quota = 0, period = 0;
        if (values >> quota >> period) take(quota, period);
      } else {
        take(std::atof(read_line(folder + "/cpu.cfs_quota_us").c_str()),
             std::atof(read_line(folder + "/cpu.cfs_period_us").c_str()));
      }
      if (group.empty() || group == "/") break;
      group = group.substr(0, group.find_last_of('/'));
    }
  }
  return best;
}

std::string model_name(const std::string& root) {
  std::ifstream file(root + "proc/cpuinfo");
  for (std::string line; std::getline(file, line);)
    if (line.rfind("model name", 0) == 0) return line.substr(std::min(line.size(), line.find(':') + 2));
  return "unknown";
}

std::vector<int> intersection(const std::vector<int>& a, const std::vector<int>& b) {
  std::vector<int> both;
  for (const int value : a)
    if (std::find(b.begin(), b.end(), value) != b.end()) both.push_back(value);
  return both;
}

// A mask may name CPUs that are switched off.
std::vector<int> online_only(const std::vector<int>& cpus, const std::string& root) {
  std::vector<int> online = intersection(cpus, parse_cpu_list(read_line(root + "sys/devices/system/cpu/online")));
  return online.empty() ? cpus : online;
}

}  // namespace

CpuInfo read_cpu_info(const std::string& root) { return read_cpu_info(root, affinity_cpus()); }

CpuInfo read_cpu_info(const std::string& root, const std::vector<int>& mask) {
  CpuInfo info;
  info.model_name = model_name(root);
  const std::vector<int> cpus = online_only(mask, root);
  info.logical_cpus = static_cast<int>(cpus.size());
  std::set<std::pair<std::string, std::string>> cores;
  for (const int cpu : cpus) {
    const std::string topology = root + "sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/";
    const std::string core = read_line(topology + "core_id");
    cores.insert({read_line(topology + "physical_package_id"), core.empty() ? "cpu" + std::to_string(cpu) : core});
  }
  info.physical_cores = static_cast<int>(cores.size());
  info.quota_cpus = cgroup_quota(root);
  const std::string nodes = root + "sys/devices/system/node/";
  for (const int node : parse_cpu_list(read_line(nodes + "online"))) {
    const std::vector<int> listed = parse_cpu_list(read_line(nodes + "node" + std::to_string(node) + "/cpulist"));
    std::vector<int> members = intersection(listed, cpus);
    if (members.empty()) continue;  // memory only, or outside the mask
    info.numa_nodes.push_back(std::move(members));
    info.numa_node_ids.push_back(node);
  }
  if (info.numa_nodes.empty()) {
    info.numa_nodes.push_back(cpus);
    info.numa_node_ids.push_back(-1);
  }
  return info;
}

int max_threads(const CpuInfo& info) {
  int threads = info.logical_cpus;
  if (info.quota_cpus > 0.0) threads = std::min(threads, static_cast<int>(info.quota_cpus));
  return std::max(threads, 1);
}

int default_threads(const CpuInfo& info) { return std::min(std::max(info.physical_cores, 1), max_threads(info)); }

int default_pools(const CpuInfo& info, int threads) {
  return std::min(static_cast<int>(info.numa_nodes.size()), threads);
}

}  // namespace kts
