// One lane: the readable meaning of the vector API that elementwise_inl.h is written on.
//
// Vec API, for W lanes:  F floats, I 32-bit integers.
//   load store set1 zero add mul div fma(a, b, c) = a * b + c, min max (second operand wins on NaN), round_even, sum
//   select_gt(x, y, a, b)  x > y ? a : b (b where one is NaN)
//   pow2(n)              2^n for integral n in [-126, 127]
//   load_bf16 / store_bf16 W bf16 <-> F (round to nearest even, NaN stays NaN)
//   load_bf16_n / store_bf16_n / load_n / store_n   the first n < W elements, zeros in the other lanes
//   iota set1_i add_i xor_i mul_i srl_i  32-bit wrap-around integers
//   keep(h, threshold, v)  v where (h >> 8) >= threshold, else 0
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>

#include "kts/types.h"

namespace kts::scalar {

struct Vec {
  using F = float;
  using I = uint32_t;
  static constexpr int W = 1;

  KTS_INLINE F load(const float* p) { return *p; }
  KTS_INLINE void store(float* p, F v) { *p = v; }
  KTS_INLINE F load_n(const float* p, int64_t) { return *p; }
  KTS_INLINE void store_n(float* p, int64_t, F v) { *p = v; }
  KTS_INLINE F set1(float v) { return v; }
  KTS_INLINE F zero() { return 0.0f; }
  KTS_INLINE F add(F a, F b) { return a + b; }
  KTS_INLINE F sub(F a, F b) { return a - b; }
  KTS_INLINE F mul(F a, F b) { return a * b; }
  KTS_INLINE F div(F a, F b) { return a / b; }
  KTS_INLINE F fma(F a, F b, F c) { return __builtin_fmaf(a, b, c); }
  KTS_INLINE F min(F a, F b) { return a < b ? a : b; }
  KTS_INLINE F max(F a, F b) { return a > b ? a : b; }
  KTS_INLINE F select_gt(F x, F y, F a, F b) { return x > y ? a : b; }
  KTS_INLINE F round_even(F a) { return __builtin_rintf(a); }
  KTS_INLINE float sum(F a) { return a; }
  KTS_INLINE F pow2(F n) { return std::bit_cast<float>(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23); }
  KTS_INLINE F load_bf16(const bf16_t* p) { return bf16_to_f32(*p); }
  KTS_INLINE F load_bf16_n(const bf16_t* p, int64_t) { return bf16_to_f32(*p); }
  KTS_INLINE void store_bf16(bf16_t* p, F v) { *p = f32_to_bf16(v); }
  KTS_INLINE void store_bf16_n(bf16_t* p, int64_t, F v) { *p = f32_to_bf16(v); }
  KTS_INLINE F load_f16(const f16_t* p) { return f16_to_f32(*p); }
  KTS_INLINE F load_f16_n(const f16_t* p, int64_t) { return f16_to_f32(*p); }
  KTS_INLINE void store_f16(f16_t* p, F v) { *p = f32_to_f16(v); }
  KTS_INLINE void store_f16_n(f16_t* p, int64_t, F v) { *p = f32_to_f16(v); }
  KTS_INLINE I iota() { return 0; }
  KTS_INLINE I set1_i(uint32_t v) { return v; }
  KTS_INLINE I add_i(I a, I b) { return a + b; }
  KTS_INLINE I xor_i(I a, I b) { return a ^ b; }
  KTS_INLINE I mul_i(I a, I b) { return a * b; }
  template <int N>
  KTS_INLINE I srl_i(I a) {
    return a >> N;
  }
  KTS_INLINE F keep(I h, int32_t threshold, F v) { return static_cast<int32_t>(h >> 8) >= threshold ? v : 0.0f; }

  // --- quantize_inl.h ---
  // Lanes are pairs of 16-bit magnitudes: the larger of `largest` and |p[0 .. 2 W)|, as bits; then the largest of all.
  KTS_INLINE I max_magnitude(I largest, const bf16_t* p) {
    const I a = p[0] & 0x7fffu, b = p[1] & 0x7fffu, pair = a > b ? a : b;
    return pair > largest ? pair : largest;
  }
  KTS_INLINE uint32_t largest_u16(I largest) { return largest; }
  // Rounds 4 W numbers within -127 .. 127 to nearest even.
  KTS_INLINE void store_int8(int8_t* q, F a, F b, F c, F d) {
    const F all[] = {a, b, c, d};
    for (int i = 0; i < 4; ++i) q[i] = static_cast<int8_t>(__builtin_rintf(all[i]));
  }
};

}  // namespace kts::scalar
