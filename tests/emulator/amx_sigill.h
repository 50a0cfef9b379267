// What the emulator of tests/emulator has executed, in all threads.
#pragma once

struct KtsEmulatorCounts {
  long signals, ldtilecfg, tilerelease, tilezero, tileloadd, tilestored, tdpbf16ps, tdpbssd, vdpbf16ps, vpdpbusd,
      vcvtneps2bf16;
};
// Weak, so that a test may ask whether the emulator is there.
extern "C" __attribute__((weak)) KtsEmulatorCounts kts_emulator_counts;
