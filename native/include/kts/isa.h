// Instruction set levels known to the kernel table, found by CPUID and the operating system's XSAVE state.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace kts {

enum Isa : uint32_t {
  kScalar = 1u << 0,  // plain C++: the reference of the tests, too slow for work
  kAvx2 = 1u << 1,    // AVX2 + FMA
  kAvx512 = 1u << 2,  // AVX-512 F, BW, DQ, VL
};
using IsaSet = uint32_t;

const char* isa_name(Isa isa);

// What this CPU and operating system can run; computed once.
IsaSet detect_isa();

// What selection may use: detect_isa() narrowed by set_isa().
IsaSet active_isa();
std::string active_isa_name();
std::vector<std::string> isa_names(IsaSet set);

// Narrows selection to the named level and those below it. Throws std::invalid_argument for an unknown name or one
// that the CPU lacks. "auto" takes the restriction away.
void set_isa(const std::string& name);

// Narrows selection within a scope (tests).
class ScopedIsa {
 public:
  explicit ScopedIsa(const std::string& name);
  ~ScopedIsa();
  ScopedIsa(const ScopedIsa&) = delete;
  ScopedIsa& operator=(const ScopedIsa&) = delete;

 private:
  IsaSet before_;
};

}  // namespace kts
