#include "kts/openmp.h"

#include <dlfcn.h>

#include <strings.h>

#include <cstdlib>
#include <cstring>

namespace kts {

namespace {

constexpr int kPauseSoft = 1;  // omp_pause_soft of the OpenMP 5.0 API: settings survive
using PauseFn = int (*)(int);

// Other runtimes export the same name with other costs: only libgomp is asked.
PauseFn find_pause() {
  void* symbol = dlsym(RTLD_DEFAULT, "omp_pause_resource_all");
  Dl_info info;
  if (symbol == nullptr || dladdr(symbol, &info) == 0 || info.dli_fname == nullptr) return nullptr;
  if (std::strstr(info.dli_fname, "libgomp") == nullptr) return nullptr;
  return reinterpret_cast<PauseFn>(symbol);
}

// Whether libgomp was told to put idle threads to sleep by itself; it reads the environment when it is loaded.
bool sleeps_when_idle() {
  const char* policy = std::getenv("OMP_WAIT_POLICY");
  const char* spins = std::getenv("GOMP_SPINCOUNT");
  if (spins != nullptr) return std::strcmp(spins, "0") == 0;  // it goes before the policy
  return policy != nullptr && strcasecmp(policy, "passive") == 0;
}

}  // namespace

void rest_openmp_threads() {
  static const PauseFn pause = sleeps_when_idle() ? nullptr : find_pause();
  if (pause != nullptr) pause(kPauseSoft);
}

}  // namespace kts
