// Symmetric int8 per output channel.
#include <cmath>

#include "kts/base.h"
#include "kts/quant.h"

namespace kts {

float quantize_row_int8(const bf16_t* w, int64_t count, int8_t* q) {
  uint32_t largest = 0;  // bf16 magnitudes order like their bits
  for (int64_t i = 0; i < count; ++i) largest = (w[i] & 0x7fffu) > largest ? (w[i] & 0x7fffu) : largest;
  KTS_CHECK(largest < 0x7f80u, "weights: expected finite numbers, found NaN or infinity");
  const float scale = bf16_to_f32(static_cast<bf16_t>(largest)) / 127.0f;
  const float inverse = scale > 0.0f ? 127.0f / bf16_to_f32(static_cast<bf16_t>(largest)) : 0.0f;
  for (int64_t i = 0; i < count; ++i) q[i] = static_cast<int8_t>(std::lrintf(bf16_to_f32(w[i]) * inverse));
  return scale;
}

}  // namespace kts
