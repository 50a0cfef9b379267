// AVX512-BF16 and AVX512-VNNI without masks, 128 to 512 bits; operands in registers, in memory and broadcast from memory.
#include "execute.h"

namespace kts_emulator {
namespace {

uint16_t narrow(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  if (magnitude < 0x00800000u) return static_cast<uint16_t>(bits >> 16 & 0x8000u);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// Odd elements first, each multiply-add rounded (SDM, VDPBF16PS).
__attribute__((target("avx2,fma"), optimize("O3"))) void pair_sums(float* sum, const uint16_t* a, const uint16_t* b,
                                                                   int lanes) {
  for (int i = 0; i < lanes; ++i) sum[i] = __builtin_fmaf(widen(a[2 * i + 1]), widen(b[2 * i + 1]), sum[i]);
  for (int i = 0; i < lanes; ++i) sum[i] = __builtin_fmaf(widen(a[2 * i]), widen(b[2 * i]), sum[i]);
}

}  // namespace

bool execute_vector(const Frame& frame, const Instruction& in) {
  const int key = in.opcode << 4 | in.prefix;
  if (key == (kBroadcastDword << 4 | 1) && !in.wide && in.memory && !in.masked && in.bytes <= 64) {
    alignas(64) uint8_t dest[64];
    for (int i = 0; i < in.bytes; i += 4) std::memcpy(dest + i, in.address(), 4);
    write_vector(frame, in.reg, in.bytes, dest);
    return true;
  }
  if (in.wide || in.bytes > 64 || (key != 0x522 && key != 0x501 && key != 0x723 && key != 0x722)) return false;
  if (in.masked) die("a masked instruction is not implemented");
  alignas(64) uint8_t dest[64] = {}, first[64] = {}, second[64] = {};
  read_vector(frame, in.reg, in.bytes, dest);
  read_vector(frame, in.vvvv, in.bytes, first);
  if (!in.memory) {
    read_vector(frame, in.rm, in.bytes, second);
  } else if (in.broadcast) {
    for (int i = 0; i < in.bytes; i += 4) std::memcpy(second + i, in.address(), 4);
  } else {
    std::memcpy(second, in.address(), static_cast<size_t>(in.bytes));
  }
  const int lanes = in.bytes / 4;
  float x[16], y[16];
  std::memcpy(x, second, 64), std::memcpy(y, first, 64);
  uint16_t* out = reinterpret_cast<uint16_t*>(dest);
  if (key == 0x522) {
    count(&kts_emulator_counts.vdpbf16ps);
    pair_sums(reinterpret_cast<float*>(dest), reinterpret_cast<uint16_t*>(first), reinterpret_cast<uint16_t*>(second),
              lanes);
  } else if (key == 0x501) {
    count(&kts_emulator_counts.vpdpbusd);
    int32_t* sum = reinterpret_cast<int32_t*>(dest);
    for (int i = 0; i < in.bytes; ++i) sum[i / 4] += first[i] * static_cast<int8_t>(second[i]);
  } else if (key == 0x723) {
    count(&kts_emulator_counts.vcvtneps2bf16);
    for (int i = 0; i < lanes; ++i) out[i] = narrow(x[i]), out[lanes + i] = narrow(y[i]);
  } else {
    count(&kts_emulator_counts.vcvtneps2bf16);
    for (int i = 0; i < lanes; ++i) out[i] = narrow(x[i]);
    write_vector(frame, in.reg, in.bytes / 2, dest);
    return true;
  }
  write_vector(frame, in.reg, in.bytes, dest);
  return true;
}

}  // namespace kts_emulator
