// What tests must know about the emulated PC that runs them where the CPU lacks their instructions (tests/emulator).
#pragma once
#include <cstdint>
#include <cstring>

// Defined where instructions are executed in software.
extern "C" unsigned kts_emulated_isa() __attribute__((weak));

namespace kts::test {

// Bochs 2.7 rounds values halfway between two normal f16 numbers away from even; CPUs do not.
inline bool f16_is_misrounded(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return kts_emulated_isa != nullptr && (bits & 0x1fffu) == 0x1000u;
}

}  // namespace kts::test
