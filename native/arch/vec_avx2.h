// Eight lanes on AVX2 + FMA. API in vec_scalar.h.
#pragma once
#include <immintrin.h>

#include "kts/types.h"

namespace kts::avx2 {

// Controls of a byte shuffle: byte `byte` of every dword to its top, zeros elsewhere.
struct TopByte {
  alignas(32) int8_t control[32];
};
constexpr TopByte to_top(int byte) {
  TopByte table{};
  for (int i = 0; i < 32; ++i) table.control[i] = static_cast<int8_t>(i % 4 == 3 ? i % 16 / 4 * 4 + byte : -1);
  return table;
}
static constexpr TopByte kToTop[4] = {to_top(0), to_top(1), to_top(2), to_top(3)};

struct Vec {
  using F = __m256;
  using I = __m256i;
  static constexpr int W = 8;

  KTS_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
  KTS_INLINE void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  KTS_INLINE I first_lanes(int64_t n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), iota()); }
  KTS_INLINE F load_n(const float* p, int64_t n) { return _mm256_maskload_ps(p, first_lanes(n)); }
  KTS_INLINE void store_n(float* p, int64_t n, F v) { _mm256_maskstore_ps(p, first_lanes(n), v); }
  KTS_INLINE F set1(float v) { return _mm256_set1_ps(v); }
  KTS_INLINE F zero() { return _mm256_setzero_ps(); }
  KTS_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
  KTS_INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  KTS_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  KTS_INLINE F div(F a, F b) { return _mm256_div_ps(a, b); }
  KTS_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  KTS_INLINE F min(F a, F b) { return _mm256_min_ps(a, b); }
  KTS_INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
  KTS_INLINE F select_gt(F x, F y, F a, F b) { return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, y, _CMP_GT_OQ)); }
  KTS_INLINE F round_even(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  KTS_INLINE float sum(F a) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
  KTS_INLINE F pow2(F n) {
    const I biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
  }
  KTS_INLINE F from_bf16(__m128i bits) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  KTS_INLINE F load_bf16(const bf16_t* p) { return from_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  KTS_INLINE F load_bf16_n(const bf16_t* p, int64_t n) {
    alignas(16) bf16_t lanes[W] = {};
    for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
    return from_bf16(_mm_load_si128(reinterpret_cast<const __m128i*>(lanes)));
  }
  KTS_INLINE __m128i to_bf16(F v) {
    const I bits = _mm256_castps_si256(v);
    const I odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    I rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const I quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
    const I is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, quiet, is_nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
  }
  KTS_INLINE void store_bf16(bf16_t* p, F v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bf16(v)); }
  KTS_INLINE void store_bf16_n(bf16_t* p, int64_t n, F v) {
    alignas(16) bf16_t lanes[W];
    _mm_store_si128(reinterpret_cast<__m128i*>(lanes), to_bf16(v));
    for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
  }
  KTS_INLINE F from_f16(__m128i bits) { return _mm256_cvtph_ps(bits); }
  // min and max return their second operand for a NaN.
  KTS_INLINE __m128i to_f16(F v) {
    return _mm256_cvtps_ph(max(set1(-65504.0f), min(set1(65504.0f), v)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  KTS_INLINE F load_f16(const f16_t* p) { return from_f16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  KTS_INLINE F load_f16_n(const f16_t* p, int64_t n) {
    alignas(16) f16_t lanes[W] = {};
    for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
    return from_f16(_mm_load_si128(reinterpret_cast<const __m128i*>(lanes)));
  }
  KTS_INLINE void store_f16(f16_t* p, F v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_f16(v)); }
  KTS_INLINE void store_f16_n(f16_t* p, int64_t n, F v) {
    alignas(16) f16_t lanes[W];
    _mm_store_si128(reinterpret_cast<__m128i*>(lanes), to_f16(v));
    for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
  }
  KTS_INLINE I iota() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
  KTS_INLINE I set1_i(uint32_t v) { return _mm256_set1_epi32(static_cast<int>(v)); }
  KTS_INLINE I add_i(I a, I b) { return _mm256_add_epi32(a, b); }
  KTS_INLINE I xor_i(I a, I b) { return _mm256_xor_si256(a, b); }
  KTS_INLINE I mul_i(I a, I b) { return _mm256_mullo_epi32(a, b); }
  template <int N>
  KTS_INLINE I srl_i(I a) {
    return _mm256_srli_epi32(a, N);
  }
  KTS_INLINE F keep(I h, int32_t threshold, F v) {
    const I kept = _mm256_cmpgt_epi32(_mm256_srli_epi32(h, 8), _mm256_set1_epi32(threshold - 1));
    return _mm256_and_ps(_mm256_castsi256_ps(kept), v);
  }

  // --- packed weights (weights_inl.h) ---
  KTS_INLINE I load_i(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  KTS_INLINE void store_i(void* p, I v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
  KTS_INLINE I as_i(F v) { return _mm256_castps_si256(v); }
  KTS_INLINE F as_f(I v) { return _mm256_castsi256_ps(v); }
  // 2^24 times byte `byte` of every dword, as a signed number. The shuffle's control stays in memory, which the compiler
  // cannot be told otherwise: it would keep controls in registers and spill sums.
  KTS_INLINE F top_byte(I quads, int byte) {
    I top;
    asm("vpshufb %2, %1, %0" : "=x"(top) : "x"(quads), "m"(kToTop[byte]));
    return _mm256_cvtepi32_ps(top);
  }
  // One half of every byte -> q (mask 0x0f, bias 0x08) or 16 q (mask 0xf0, bias 0x80).
  KTS_INLINE I nibbles(I bytes, I mask, I bias) { return _mm256_sub_epi8(_mm256_and_si256(bytes, mask), bias); }
  // A dword holds the pair (k even, k odd) of one n: the two halves as floats.
  KTS_INLINE F even(I pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
  KTS_INLINE F odd(I pairs) {
    return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  // --- block types (block_weights_inl.h) ---
  KTS_INLINE I load_table(const int8_t* table) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
  }
  KTS_INLINE I look_up(I table, I bytes) { return _mm256_shuffle_epi8(table, bytes); }
  KTS_INLINE I srl_by(I a, int count) { return _mm256_srlv_epi32(a, _mm256_set1_epi32(count)); }
  KTS_INLINE I or_i(I a, I b) { return _mm256_or_si256(a, b); }
  KTS_INLINE I sub_i8(I a, I b) { return _mm256_sub_epi8(a, b); }
  KTS_INLINE F load_int8(const uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  // 2^(byte - 152): e8m0 of codes twice the value, times 2^-24. Below 2^-126: zero.
  KTS_INLINE F load_e8m0(const uint8_t* p) {
    const I e = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_max_epi32(_mm256_sub_epi32(e, _mm256_set1_epi32(25)), _mm256_setzero_si256()), 23));
  }
  // rows[i] lane j <-> rows[j] lane i
  KTS_INLINE void transpose(I (&rows)[W]) {
    I pair[W], quad[W];
    for (int i = 0; i < W; i += 2) {
      pair[i] = _mm256_unpacklo_epi32(rows[i], rows[i + 1]);
      pair[i + 1] = _mm256_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < W; i += 4) {
      quad[i] = _mm256_unpacklo_epi64(pair[i], pair[i + 2]);
      quad[i + 1] = _mm256_unpackhi_epi64(pair[i], pair[i + 2]);
      quad[i + 2] = _mm256_unpacklo_epi64(pair[i + 1], pair[i + 3]);
      quad[i + 3] = _mm256_unpackhi_epi64(pair[i + 1], pair[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
      rows[i] = _mm256_permute2x128_si256(quad[i], quad[i + 4], 0x20);
      rows[i + 4] = _mm256_permute2x128_si256(quad[i], quad[i + 4], 0x31);
    }
  }
  // even = columns 0, 2, 4, ...; odd = 1, 3, 5, ... -> 2 W columns in order
  KTS_INLINE void interleave(F even, F odd, F* low, F* high) {
    const F a = _mm256_unpacklo_ps(even, odd);  // 0 1 2 3 | 8 9 10 11
    const F b = _mm256_unpackhi_ps(even, odd);  // 4 5 6 7 | 12 13 14 15
    *low = _mm256_permute2f128_ps(a, b, 0x20);
    *high = _mm256_permute2f128_ps(a, b, 0x31);
  }
  // and back
  KTS_INLINE void deinterleave(F low, F high, F* even, F* odd) {
    const F a = _mm256_permute2f128_ps(low, high, 0x20);  // 0 1 2 3 | 8 9 10 11
    const F b = _mm256_permute2f128_ps(low, high, 0x31);  // 4 5 6 7 | 12 13 14 15
    *even = _mm256_shuffle_ps(a, b, 0x88);
    *odd = _mm256_shuffle_ps(a, b, 0xdd);
  }

  // --- gemv_bfp_inl.h ---
  KTS_INLINE I and_i(I a, I b) { return _mm256_and_si256(a, b); }
  template <int N>
  KTS_INLINE I sll_i16(I a) {
    return _mm256_slli_epi16(a, N);
  }
  template <int N>
  KTS_INLINE I srl_i16(I a) {
    return _mm256_srli_epi16(a, N);
  }
  template <int N>
  KTS_INLINE I sra_i16(I a) {
    return _mm256_srai_epi16(a, N);
  }
  KTS_INLINE I to_i32(F v) { return _mm256_cvtps_epi32(v); }
  KTS_INLINE F to_f32(I v) { return _mm256_cvtepi32_ps(v); }
  KTS_INLINE int32_t sum_i(I a) {
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
  }
  KTS_INLINE I set1_pair(const int16_t* p) {
    return _mm256_castps_si256(_mm256_broadcast_ss(reinterpret_cast<const float*>(p)));
  }
  // sum + a0 * b0 + a1 * b1 of the int16 pairs of every dword
  KTS_INLINE I dot_i16(I sum, I a, I b) {
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
    asm("" : "+x"(sum));  // otherwise the compiler adds products to each other first, and sums leave the registers
    return sum;
  }
  // int32 -> int16, in fours: 0, 2, 1, 3
  KTS_INLINE void store_i16_pairs(int16_t* p, I v) {
    const I order = _mm256_setr_epi8(0, 1, 8, 9, 4, 5, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                     0, 1, 8, 9, 4, 5, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1);
    const I low = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(v, order), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(low));
  }

  // --- quantize_inl.h ---
  KTS_INLINE I max_magnitude(I largest, const bf16_t* p) {
    return _mm256_max_epu16(largest, _mm256_and_si256(load_i(p), _mm256_set1_epi16(0x7fff)));
  }
  KTS_INLINE uint32_t largest_u16(I largest) {
    const __m128i half = _mm_max_epu16(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
    const __m128i least = _mm_minpos_epu16(_mm_xor_si128(half, _mm_set1_epi16(-1)));
    return static_cast<uint32_t>(_mm_extract_epi16(least, 0)) ^ 0xffffu;
  }
  KTS_INLINE void store_int8(int8_t* q, F a, F b, F c, F d) {
    const I ab = _mm256_packs_epi32(_mm256_cvtps_epi32(a), _mm256_cvtps_epi32(b));
    const I cd = _mm256_packs_epi32(_mm256_cvtps_epi32(c), _mm256_cvtps_epi32(d));
    const I order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // packing goes by halves of a register
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(q), _mm256_permutevar8x32_epi32(_mm256_packs_epi16(ab, cd), order));
  }
};

}  // namespace kts::avx2
