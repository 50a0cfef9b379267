#include "kts/isa.h"

#include <atomic>
#include <stdexcept>

#include "kts/base.h"
#include "kts/elementwise.h"

namespace kts {

namespace {
constexpr Isa kLevels[] = {kScalar, kAvx2, kAvx512};
std::atomic<IsaSet> allowed_isa{~0u};

IsaSet levels_up_to(Isa level) { return (static_cast<IsaSet>(level) << 1) - 1; }
}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case kScalar:
      return "scalar";
    case kAvx2:
      return "avx2";
    case kAvx512:
      return "avx512";
  }
  return "unknown";
}

// __builtin_cpu_supports asks CPUID and, for the wide registers, XGETBV: a level that the operating system does not
// save is absent.
IsaSet detect_isa() {
  static const IsaSet detected = [] {
    __builtin_cpu_init();
    IsaSet set = kScalar;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) set |= kAvx2;
    if ((set & kAvx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      set |= kAvx512;
    return set;
  }();
  return detected;
}

IsaSet active_isa() { return detect_isa() & allowed_isa.load(std::memory_order_relaxed); }

std::string active_isa_name() { return isa_names(active_isa()).back(); }

std::vector<std::string> isa_names(IsaSet set) {
  std::vector<std::string> names;
  for (const Isa level : kLevels)
    if (set & level) names.push_back(isa_name(level));
  return names;
}

void set_isa(const std::string& name) {
  if (name == "auto") {
    allowed_isa = ~0u;
    return;
  }
  for (const Isa level : kLevels) {
    if (name != isa_name(level)) continue;
    if ((detect_isa() & level) == 0)
      throw std::invalid_argument("isa: this CPU lacks " + name + "; it has up to " + isa_names(detect_isa()).back());
    allowed_isa = levels_up_to(level);
    return;
  }
  throw std::invalid_argument("isa: expected auto, scalar, avx2 or avx512, got " + name);
}

ScopedIsa::ScopedIsa(const std::string& name) : before_(allowed_isa) { set_isa(name); }
ScopedIsa::~ScopedIsa() { allowed_isa = before_; }

const RowOps& row_ops(IsaSet isa) {
  if (isa & kAvx512) return avx512::kRowOps;
  if (isa & kAvx2) return avx2::kRowOps;
  return scalar::kRowOps;
}

bool activation_from_name(const char* name, Activation* out) {
  if (std::string(name) != "silu") return false;
  *out = Activation::kSilu;
  return true;
}

}  // namespace kts
