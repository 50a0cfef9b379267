// One instruction of the kinds that the emulator executes, VEX and EVEX in the opcode map 0F38, with its operands.
#pragma once

#include <cstdint>

#include "signal_frame.h"

namespace kts_emulator {

// VPBROADCASTD from memory is no missing instruction, but stands between most dot products: executing it here keeps them
// in one run.
constexpr int kBroadcastDword = 0x58;

struct Instruction {
  int prefix = 0;  // none, 66, F3, F2 as 0 .. 3
  uint8_t opcode = 0;
  bool evex = false, wide = false, broadcast = false, masked = false;
  int bytes = 16;  // vector length
  int reg = 0, vvvv = 0, rm = 0;
  bool memory = false;
  uint64_t base = 0;  // memory: base + displacement
  uint64_t index = 0;
  int scale = 1;
  int64_t displacement = 0;
  bool rip_relative = false;
  const uint8_t* end = nullptr;

  const uint8_t* address() const { return reinterpret_cast<const uint8_t*>(base + displacement + index * scale); }
};

// False for other encodings. That the emulator knows the opcode is for the executing function to say.
bool decode(const Frame& frame, const uint8_t* p, Instruction* out);

}  // namespace kts_emulator
