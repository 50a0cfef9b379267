// Threads over pools, pools over NUMA nodes, threads and memory bound to them by system call: no libnuma.
#include <linux/mempolicy.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <iterator>
#include <vector>

#include "kts/base.h"
#include "kts/topology.h"

namespace kts {

namespace {

constexpr int kWordBits = 64;

// Bit sets of any length: cpu_set_t ends at CPU 1023.
using Bits = std::vector<unsigned long>;

void set_bit(Bits& bits, int bit) {
  const size_t word = static_cast<size_t>(bit / kWordBits);
  if (bits.size() <= word) bits.resize(word + 1, 0);
  bits[word] |= 1ul << bit % kWordBits;
}

}  // namespace

std::vector<int> affinity_cpus() {
  Bits bits(1024 / kWordBits);
  long bytes = 0;
  while ((bytes = syscall(SYS_sched_getaffinity, 0, bits.size() * sizeof(long), bits.data())) < 0) {
    if (errno != EINVAL || bits.size() > (size_t{1} << 16)) return {0};
    bits.resize(bits.size() * 2);  // the system has more CPUs than bits
  }
  std::vector<int> cpus;
  for (int cpu = 0; cpu < static_cast<int>(bytes) * 8; ++cpu)
    if (bits[static_cast<size_t>(cpu / kWordBits)] >> cpu % kWordBits & 1) cpus.push_back(cpu);
  return cpus;
}

void bind_to_cpus(const std::vector<int>& cpus) {
  const std::vector<int> allowed = affinity_cpus();
  Bits bits;
  for (const int cpu : cpus)
    if (std::find(allowed.begin(), allowed.end(), cpu) != allowed.end()) set_bit(bits, cpu);
  if (bits.empty()) return;  // an unbound worker is slower, not wrong
  syscall(SYS_sched_setaffinity, 0, bits.size() * sizeof(long), bits.data());
}

std::vector<PoolPlace> pool_places(const CpuInfo& info, int pools) {
  const size_t nodes = info.numa_nodes.size(), count = static_cast<size_t>(pools);
  std::vector<PoolPlace> places(count);
  for (size_t node = 0; node < nodes; ++node) {
    PoolPlace& place = places[node * count / nodes];
    place.cpus.insert(place.cpus.end(), info.numa_nodes[node].begin(), info.numa_nodes[node].end());
    if (info.numa_node_ids[node] >= 0) place.nodes.push_back(info.numa_node_ids[node]);
  }
  return places;
}

std::vector<int> spread_threads(int threads, const std::vector<PoolPlace>& places) {
  std::vector<int> sizes(places.size(), 0);
  const auto has_room = [&](size_t pool) {
    return places[pool].cpus.empty() || sizes[pool] < static_cast<int>(places[pool].cpus.size());
  };
  for (int thread = 0; thread < threads; ++thread) {
    size_t best = 0;
    for (size_t pool = 1; pool < places.size(); ++pool) {
      const bool room = has_room(pool), best_room = has_room(best);
      if (room != best_room ? room : sizes[pool] < sizes[best]) best = pool;
    }
    ++sizes[best];
  }
  std::vector<int> pool_of;
  for (size_t pool = 0; pool < places.size(); ++pool)
    pool_of.insert(pool_of.end(), static_cast<size_t>(sizes[pool]), static_cast<int>(pool));
  return pool_of;
}

bool place_on_nodes(void* memory, size_t bytes, const std::vector<int>& nodes) {
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / page * page;
  if (nodes.empty() || begin >= end) return false;
  Bits bits;
  for (const int node : nodes) set_bit(bits, node);
  const int policy = nodes.size() == 1 ? MPOL_PREFERRED : MPOL_INTERLEAVE;
  // The system reads one bit less than it is told.
  return syscall(SYS_mbind, begin, end - begin, policy, bits.data(), bits.size() * kWordBits + 1, 0) == 0;
}

}  // namespace kts
