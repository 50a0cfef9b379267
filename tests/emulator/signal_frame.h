// The registers of the thread that a signal interrupted: the signal frame holds them, vectors in XSAVE format.
#pragma once

#include <ucontext.h>

#include <cstdint>

namespace kts_emulator {

struct Frame {
  greg_t* gregs;
  uint8_t* xsave;

  uint64_t reg(int number) const {
    static constexpr int kIndex[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                       REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return static_cast<uint64_t>(gregs[kIndex[number]]);
  }
};

// Asks the CPU where XSAVE puts the vector registers; once, before the first access.
void find_vectors();

void read_vector(const Frame& frame, int number, int bytes, void* to);

// Bytes beyond `bytes` become zero, as every EVEX instruction does.
void write_vector(const Frame& frame, int number, int bytes, const void* from);

}  // namespace kts_emulator
