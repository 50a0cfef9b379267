// Which levels this CPU has, found by CPUID and the operating system's XSAVE state, and which of them selection may use.
#pragma once
#include <string>
#include <vector>

#include "kts/isa.h"

namespace kts {

const char* isa_name(Isa isa);

// What this CPU and operating system can run; computed once. A test that emulates instructions may define
// `extern "C" unsigned kts_emulated_isa()`, whose levels are added.
IsaSet detect_isa();

// Why AMX is not in detect_isa(): empty when it is there, else one phrase for people.
const char* amx_refusal();

// What selection may use: detect_isa() narrowed by set_isa().
IsaSet active_isa();
std::string active_isa_name();
std::vector<std::string> isa_names(IsaSet set);

// Every level, narrowest first.
const std::vector<Isa>& isa_levels();

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
