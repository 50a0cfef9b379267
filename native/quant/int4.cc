// Symmetric int4 per group. Candidates: the signed value of largest magnitude divided by -8 * f and by 7 * f, for
// factors f around 1, each rounded to 5 significant bits; the one with the least squared error wins.
#include <cmath>
#include <cstring>
#include <initializer_list>

#include "kts/base.h"
#include "kts/quant.h"

namespace kts {

namespace {

constexpr int64_t kMaxGroup = 128;
constexpr float kFactors[] = {0.76f, 0.80f, 0.84f, 0.88f, 0.92f, 0.96f, 1.0f, 1.04f, 1.08f};

float round_to_5_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  bits = (bits + (1u << 18)) & ~((1u << 19) - 1);
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

float quantize_one(float w, float inverse) { return std::fmin(std::fmax(std::nearbyintf(w * inverse), -8.0f), 7.0f); }

float squared_error(const float* w, int64_t count, float scale) {
  const float inverse = 1.0f / scale;
  float sum = 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    const float error = w[i] - scale * quantize_one(w[i], inverse);
    sum += error * error;
  }
  return sum;
}

}  // namespace

float quantize_group_int4(const bf16_t* w, int64_t count, int8_t* q) {
  float values[kMaxGroup], largest = 0.0f;
  KTS_CHECK(count <= kMaxGroup, "int4: expected groups of at most 128");
  for (int64_t i = 0; i < count; ++i) {
    values[i] = bf16_to_f32(w[i]);
    KTS_CHECK(std::isfinite(values[i]), "weights: expected finite numbers, found NaN or infinity");
    if (std::fabs(values[i]) > std::fabs(largest)) largest = values[i];
  }
  float best_scale = 0.0f, best_error = INFINITY;
  for (const float factor : kFactors)
    for (const float steps : {-8.0f, 7.0f}) {
      const float scale = round_to_5_bits(largest / (steps * factor));
      if (std::fabs(scale) < 1e-30f) continue;
      const float error = squared_error(values, count, scale);
      if (error < best_error) best_error = error, best_scale = scale;
    }
  const float inverse = best_scale != 0.0f ? 1.0f / best_scale : 0.0f;
  for (int64_t i = 0; i < count; ++i) q[i] = static_cast<int8_t>(quantize_one(values[i], inverse));
  return best_scale;
}

}  // namespace kts
