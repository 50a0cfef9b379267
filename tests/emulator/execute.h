// Executing a decoded instruction: on this thread's tiles or on the interrupted thread's vector registers. False where the
// instruction is not one of the emulated ones.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "amx_sigill.h"
#include "decode.h"

namespace kts_emulator {

// LDTILECFG TILERELEASE TILEZERO TILELOADD TILESTORED TDPBF16PS TDPBSSD.
bool execute_tile(const Instruction& in);

// VDPBF16PS VPDPBUSD VCVTNE2PS2BF16 VCVTNEPS2BF16, and VPBROADCASTD from memory.
bool execute_vector(const Frame& frame, const Instruction& in);

[[noreturn]] inline void die(const char* message) {
  const char prefix[] = "amx_sigill: ";
  if (write(2, prefix, sizeof(prefix) - 1) < 0 || write(2, message, std::strlen(message)) < 0 || write(2, "\n", 1) < 0)
    _exit(99);
  abort();
}

inline void count(long* counter) { __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED); }

inline float widen(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

}  // namespace kts_emulator
