// Number formats. bf16 is kept as its bit pattern; conversions round to nearest even and keep NaN a NaN.
#pragma once
#include <cstdint>
#include <cstring>

#include "kts/base.h"

namespace kts {

using bf16_t = uint16_t;

KTS_INLINE float bf16_to_f32(bf16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

KTS_INLINE bf16_t f32_to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<bf16_t>((bits >> 16) | 0x40u);  // quiet NaN
  return static_cast<bf16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

KTS_INLINE float round_to_bf16(float value) { return bf16_to_f32(f32_to_bf16(value)); }

}  // namespace kts
