// Quantisation loops written once on Vec (arch/vec_*.h): activation rows and weights. Same bits on every ISA. Include
// only from elementwise_<isa>.cc (through elementwise_inl.h) and quant_<isa>.cc.
#pragma once
#include <bit>
#include <cstring>

#include "kts/elementwise.h"
#include "kts/quant.h"

namespace kts {

constexpr float kLeastScale = 0x1p-126f;  // the least normal f32: no scale is denormal and no inverse overflows

// Bits of the largest magnitude; infinity and NaN come out above all numbers.
template <class V>
uint32_t largest_bf16(const bf16_t* x, int64_t count) {
  KTS_DCHECK(is_array(x, count));
  auto lanes = V::set1_i(0);
  int64_t j = 0;
  for (; j + 2 * V::W <= count; j += 2 * V::W) lanes = V::max_magnitude(lanes, x + j);
  uint32_t largest = V::largest_u16(lanes);
  for (; j < count; ++j) largest = (x[j] & 0x7fffu) > largest ? (x[j] & 0x7fffu) : largest;
  return largest;
}

// q = round(x * inverse), |x * inverse| <= 127
template <class V>
void round_int8(const bf16_t* x, int64_t count, float inverse, int8_t* q) {
  KTS_DCHECK(is_array(x, count) && is_array(q, count) && inverse >= 0.0f && inverse <= 0x1p126f);
  constexpr int64_t kBlock = 4 * V::W;
  const auto factor = V::set1(inverse);
  const auto block = [&](const bf16_t* from, int8_t* to) {
    V::store_int8(to, V::mul(V::load_bf16(from), factor), V::mul(V::load_bf16(from + V::W), factor),
                  V::mul(V::load_bf16(from + 2 * V::W), factor), V::mul(V::load_bf16(from + 3 * V::W), factor));
  };
  int64_t j = 0;
  for (; j + kBlock <= count; j += kBlock) block(x + j, q + j);
  if (j == count) return;
  alignas(64) bf16_t from[kBlock] = {};
  alignas(64) int8_t to[kBlock];
  for (int64_t i = 0; i < count - j; ++i) from[i] = x[j + i];
  block(from, to);
  for (int64_t i = 0; i < count - j; ++i) q[j + i] = to[i];
}

template <class V>
float quantize_row(const bf16_t* x, int64_t cols, int8_t* q) {
  KTS_DCHECK(is_array(x, cols) && is_array(q, cols));
  const uint32_t largest = largest_bf16<V>(x, cols);
  const bool rounds = largest > 0 && largest < 0x7f80u;
  const Int8Scale scale = int8_scale(largest);
  if (rounds) round_int8<V>(x, cols, scale.inverse, q);
  for (int64_t j = rounds ? cols : 0; j < align_up(cols, 64); ++j) q[j] = 0;
  return scale.scale;
}

// One candidate magnitude for both signs. The scale -s has the range -7 s .. 8 s, written here with q negated.
template <class V>
struct Int4Errors {
  float plus, minus;
};
template <class V>
KTS_INLINE Int4Errors<V> int4_errors(const float* w, int64_t count, float s) {
  const auto inverse = V::set1(1.0f / s), scale = V::set1(s);
  const auto seven = V::set1(7.0f), eight = V::set1(8.0f), minus_seven = V::set1(-7.0f), minus_eight = V::set1(-8.0f);
  auto plus = V::zero(), minus = V::zero();
  for (int64_t j = 0; j < count; j += V::W) {
    const auto value = V::load(w + j), q = V::round_even(V::mul(value, inverse));
    const auto below = V::sub(value, V::mul(scale, V::max(minus_eight, V::min(seven, q))));
    const auto above = V::sub(value, V::mul(scale, V::max(minus_seven, V::min(eight, q))));
    plus = V::add(plus, V::mul(below, below));
    minus = V::add(minus, V::mul(above, above));
  }
  return {V::sum(plus), V::sum(minus)};
}

// The search of gemm/quantize.cc. w [count] times 2^-shift, zeros up to a multiple of 8; `largest` is in [2, 4).
template <class V>
KTS_INLINE float int4_search(const float* w, int64_t count, float largest, float least, float most) {
  constexpr uint32_t kStep = 1u << 19;  // numbers of 5 significant bits are this far apart as bits
  float best = 0.0f, best_error = __builtin_inff();
  const uint32_t begin = (std::bit_cast<uint32_t>(largest * (3.0f / 32)) + kStep - 1) & ~(kStep - 1);
  for (uint32_t bits = begin; std::bit_cast<float>(bits) <= largest * (5.0f / 32); bits += kStep) {
    const float s = std::bit_cast<float>(bits);
    if (s < least || s > most) continue;
    const Int4Errors<V> error = int4_errors<V>(w, count, s);
    if (error.plus < best_error) best = s, best_error = error.plus;
    if (error.minus < best_error) best = -s, best_error = error.minus;
  }
  return best;
}

// q = clamp(round(w * inverse), -8, 7)
template <class V>
KTS_INLINE void round_int4(const float* w, int64_t count, float inverse, int8_t* q) {
  const auto factor = V::set1(inverse), low = V::set1(-8.0f), high = V::set1(7.0f);
  const auto rounded = [&](int64_t j) {
    return V::max(low, V::min(high, V::round_even(V::mul(V::load(w + j), factor))));
  };
  alignas(64) int8_t lanes[128];
  for (int64_t j = 0; j < count; j += 4 * V::W)
    V::store_int8(lanes + j, rounded(j), rounded(j + V::W), rounded(j + 2 * V::W), rounded(j + 3 * V::W));
  std::memcpy(q, lanes, static_cast<size_t>(count));
}

template <class V>
float quantize_int4(const bf16_t* w, int64_t count, uint32_t largest, int8_t* q) {
  KTS_DCHECK(count >= 1 && count <= 128 && is_array(w, count) && is_array(q, count));
  KTS_DCHECK(largest >= 1 && largest < 0x7f80u);
  static_assert(V::W == 8, "sums of squared errors have eight lanes on every ISA");
  alignas(64) float values[128];
  const float magnitude = std::bit_cast<float>(largest << 16);
  const bool searches = magnitude >= 7 * kLeastScale;
  // Powers of two that scale `magnitude` into [2, 4) and back.
  const int exponent = static_cast<int>(largest >> 7) - 128;
  const float down = searches ? std::bit_cast<float>(static_cast<uint32_t>(127 - exponent) << 23) : 1.0f;
  const auto factor = V::set1(down);
  for (int64_t j = 0; j < align_up(count, 4 * V::W); j += V::W)
    V::store(values + j, V::mul(j + V::W <= count ? V::load_bf16(w + j)
                                : j < count       ? V::load_bf16_n(w + j, count - j)
                                                  : V::zero(),
                                factor));
  if (!searches) {
    round_int4<V>(values, count, 1.0f / kLeastScale, q);
    return kLeastScale;
  }
  // 8 s must stay finite after scaling back; nor may s become denormal.
  const float most = exponent == 126 ? 0.484375f : 4.0f, least = kLeastScale * down;
  const float best = int4_search<V>(values, align_up(count, V::W), magnitude * down, least, most);
  round_int4<V>(values, count, 1.0f / best, q);
  return best * std::bit_cast<float>(static_cast<uint32_t>(127 + exponent) << 23);
}

template <class V8, class V>
constexpr QuantOps make_quant_ops(Isa isa) {
  return QuantOps{isa, largest_bf16<V>, round_int8<V>, quantize_int4<V8>};
}

}  // namespace kts
