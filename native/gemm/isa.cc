#include "kts/cpu_isa.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <stdexcept>

// Defined only by tests that execute missing instructions in software (tests/emulator).
extern "C" unsigned kts_emulated_isa() __attribute__((weak));

namespace kts {

namespace {

struct Level {
  Isa isa;
  const char* name;
};
constexpr Level kLevels[] = {
    {kScalar, "scalar"},          {kAvx2, "avx2"},        {kAvx512, "avx512"},   {kAvx512Vnni, "avx512_vnni"},
    {kAvx512Bf16, "avx512_bf16"}, {kAmxBf16, "amx_bf16"}, {kAmxInt8, "amx_int8"}};
std::atomic<IsaSet> allowed_isa{~0u};

IsaSet levels_up_to(Isa level) { return (static_cast<IsaSet>(level) << 1) - 1; }

struct Detected {
  IsaSet isa = kScalar;
  const char* amx_refusal = "";
};

// Linux gives a process the 8 KiB of tile state only on request (arch_prctl(2), since 5.16); threads inherit it.
const char* request_tile_state() {
  constexpr long kArchReqXcompPerm = 0x1023, kXfeatureXtiledata = 18;
  if (syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0) return "";
  return "the operating system refused the tile state (Linux 5.16 or later is needed)";
}

void detect_amx(Detected& found) {
  unsigned a = 7, b = 0, c = 0, d = 0;
  __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  const bool tile = d >> 24 & 1, bf16 = d >> 22 & 1, int8 = d >> 25 & 1;
  if (!tile) {
    found.amx_refusal = "the CPU has no AMX";
    return;
  }
  if (!(found.isa & kAvx512)) {
    found.amx_refusal = "the operating system does not save AVX-512 state";
    return;
  }
  found.amx_refusal = request_tile_state();
  if (*found.amx_refusal != 0) return;
  if (bf16) found.isa |= kAmxBf16;
  if (int8) found.isa |= kAmxInt8;
}

// __builtin_cpu_supports asks CPUID and, for the wide registers, XGETBV: a level that the operating system does not
// save is absent.
Detected detect() {
  Detected found;
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    found.isa |= kAvx2;
  if ((found.isa & kAvx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    found.isa |= kAvx512;
  if (found.isa & kAvx512) {
    if (__builtin_cpu_supports("avx512vnni")) found.isa |= kAvx512Vnni;
    if (__builtin_cpu_supports("avx512bf16")) found.isa |= kAvx512Bf16;
  }
  detect_amx(found);
  if (kts_emulated_isa != nullptr) found.isa |= kts_emulated_isa();
  if (found.isa & (kAmxBf16 | kAmxInt8)) found.amx_refusal = "";
  return found;
}

const Detected& detected() {
  static const Detected found = detect();
  return found;
}

}  // namespace

const char* isa_name(Isa isa) {
  for (const Level& level : kLevels)
    if (level.isa == isa) return level.name;
  return "unknown";
}

const std::vector<Isa>& isa_levels() {
  static const auto& levels =
      *new std::vector<Isa>{kScalar, kAvx2, kAvx512, kAvx512Vnni, kAvx512Bf16, kAmxBf16, kAmxInt8};
  return levels;
}

IsaSet detect_isa() { return detected().isa; }

const char* amx_refusal() { return detected().amx_refusal; }

IsaSet active_isa() { return detect_isa() & allowed_isa.load(std::memory_order_relaxed); }

std::string active_isa_name() { return isa_names(active_isa()).back(); }

std::vector<std::string> isa_names(IsaSet set) {
  std::vector<std::string> names;
  for (const Level& level : kLevels)
    if (set & level.isa) names.push_back(level.name);
  return names;
}

void set_isa(const std::string& name) {
  if (name == "auto") {
    allowed_isa = ~0u;
    return;
  }
  std::string known = "auto";
  for (const Level& level : kLevels) {
    known += std::string(", ") + level.name;
    if (name != level.name) continue;
    if ((detect_isa() & level.isa) == 0) {
      std::string reason = "isa: this CPU lacks " + name + "; it has up to " + isa_names(detect_isa()).back();
      if ((level.isa & (kAmxBf16 | kAmxInt8)) && *amx_refusal() != 0) reason += std::string(" (") + amx_refusal() + ")";
      throw std::invalid_argument(reason);
    }
    allowed_isa = levels_up_to(level.isa);
    return;
  }
  throw std::invalid_argument("isa: expected one of " + known + "; got " + name);
}

ScopedIsa::ScopedIsa(const std::string& name) : before_(allowed_isa) { set_isa(name); }
ScopedIsa::~ScopedIsa() { allowed_isa = before_; }

}  // namespace kts
