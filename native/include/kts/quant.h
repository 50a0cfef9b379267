// From bf16 to integers. Rounding is to nearest, ties to even; results have the same bits on every ISA.
#pragma once
#include <cstdint>

#include "kts/isa.h"
#include "kts/types.h"

namespace kts {

// int8, symmetric: q = round(x * inverse), so |q| <= 127; scale = max |x| / 127 and inverse = 127 / max |x|, but no
// scale is below 2^-126: numbers of that size are denormal and may be flushed. Zeros have scale 0, a NaN or infinity
// gives NaN.
struct Int8Scale {
  float scale, inverse;
};

// `largest`: the bits of the largest magnitude, as QuantOps::largest returns them.
KTS_INLINE Int8Scale int8_scale(uint32_t largest) {
  if (largest == 0) return {0.0f, 0.0f};
  if (largest >= 0x7f80u) return {__builtin_nanf(""), 0.0f};
  const float max_abs = bf16_to_f32(static_cast<bf16_t>(largest));
  if (max_abs < 127.0f * 0x1p-126f) return {0x1p-126f, 0x1p126f};
  return {max_abs / 127.0f, 127.0f / max_abs};
}

// The loops of the quantisers, one table per ISA.
struct QuantOps {
  Isa isa;
  // Bits of the largest magnitude; 0x7f80 and above: x holds an infinity or NaN.
  uint32_t (*largest)(const bf16_t* x, int64_t count);
  void (*round_int8)(const bf16_t* x, int64_t count, float inverse, int8_t* q);
  // The group of quantize_group_int4, whose largest magnitude is neither zero nor infinite.
  float (*int4)(const bf16_t* w, int64_t count, uint32_t largest, int8_t* q);
};

namespace scalar {
extern const QuantOps kQuantOps;
}
namespace avx2 {
extern const QuantOps kQuantOps;
}

}  // namespace kts
