// Number formats. bf16 is kept as its bit pattern; conversions round to nearest even and keep NaN a NaN.
#pragma once
#include <bit>
#include <cstdint>

#include "kts/base.h"

namespace kts {

using bf16_t = uint16_t;

KTS_INLINE float bf16_to_f32(bf16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

KTS_INLINE bf16_t f32_to_bf16(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<bf16_t>((bits >> 16) | 0x40u);  // quiet NaN
  return static_cast<bf16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// IEEE binary16 as its bit pattern. Conversion rounds to nearest even, saturates at +-65504 and keeps NaN a NaN.
using f16_t = uint16_t;

KTS_INLINE float f16_to_f32(f16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16, exponent = bits >> 10 & 31u,
                 mantissa = bits & 1023u;
  if (exponent == 0) {
    const float value = static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // 2^-24
    return sign != 0 ? -value : value;
  }
  const uint32_t wide = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
  return std::bit_cast<float>(wide);
}

KTS_INLINE f16_t f32_to_f16(float value) {
  auto bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = bits >> 16 & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return static_cast<f16_t>(sign | 0x7e00u);
  if (bits > 0x477fe000u) bits = 0x477fe000u;  // 65504
  if (bits < 0x38800000u) {                    // 2^-14: below it multiples of 2^-24
    const auto magnitude = std::bit_cast<float>(bits);
    return static_cast<f16_t>(sign | static_cast<uint32_t>(__builtin_rintf(magnitude * 16777216.0f)));
  }
  return static_cast<f16_t>(sign | ((bits - (112u << 23) + 0xfffu + (bits >> 13 & 1u)) >> 13));
}

KTS_INLINE float round_to_bf16(float value) { return bf16_to_f32(f32_to_bf16(value)); }

}  // namespace kts
