#include "signal_frame.h"

#include <cpuid.h>

#include <cstring>

namespace kts_emulator {
namespace {

// Offsets of the standard format: upper half of YMM, upper half of ZMM0-15, ZMM16-31.
unsigned ymm_offset, zmm_offset, high_zmm_offset;

// The 16-byte quarter `part` of vector register `number`.
uint8_t* vector_part(const Frame& frame, int number, int part) {
  if (number >= 16) return frame.xsave + high_zmm_offset + (number - 16) * 64 + part * 16;
  if (part == 0) return frame.xsave + 160 + number * 16;
  if (part == 1) return frame.xsave + ymm_offset + number * 16;
  return frame.xsave + zmm_offset + number * 32 + (part - 2) * 16;
}

unsigned component_offset(unsigned component) {
  unsigned a = 0, b = 0, c = 0, d = 0;
  __cpuid_count(13, component, a, b, c, d);
  return b;
}

}  // namespace

void find_vectors() {
  ymm_offset = component_offset(2);
  zmm_offset = component_offset(6);
  high_zmm_offset = component_offset(7);
}

void read_vector(const Frame& frame, int number, int bytes, void* to) {
  for (int part = 0; part < bytes / 16; ++part)
    std::memcpy(static_cast<uint8_t*>(to) + part * 16, vector_part(frame, number, part), 16);
}

void write_vector(const Frame& frame, int number, int bytes, const void* from) {
  for (int part = 0; part < 4; ++part) {
    if (part < bytes / 16)
      std::memcpy(vector_part(frame, number, part), static_cast<const uint8_t*>(from) + part * 16, 16);
    else
      std::memset(vector_part(frame, number, part), 0, 16);
  }
  uint64_t in_use;  // XSTATE_BV: components whose bytes are restored
  std::memcpy(&in_use, frame.xsave + 512, sizeof(in_use));
  in_use |= 0xe6;
  std::memcpy(frame.xsave + 512, &in_use, sizeof(in_use));
}

}  // namespace kts_emulator
