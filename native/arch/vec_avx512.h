// Sixteen lanes on AVX-512 F, BW, DQ, VL. API in vec_scalar.h and, for tiles, vec_avx2.h.
#pragma once
#include <immintrin.h>

#include <cstring>

#include "kts/types.h"

namespace kts::avx512 {

// Controls of a byte shuffle, per 16 bytes: byte `byte` of every dword to its top, zeros elsewhere.
struct TopByte {
  alignas(16) int8_t control[16];
};
constexpr TopByte to_top(int byte) {
  TopByte table{};
  for (int i = 0; i < 16; ++i) table.control[i] = static_cast<int8_t>(i % 4 == 3 ? i / 4 * 4 + byte : -1);
  return table;
}
static constexpr TopByte kToTop[4] = {to_top(0), to_top(1), to_top(2), to_top(3)};

struct Vec {
  using F = __m512;
  using I = __m512i;
  static constexpr int W = 16;

  KTS_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
  KTS_INLINE void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  KTS_INLINE __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }
  KTS_INLINE F load_n(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
  KTS_INLINE void store_n(float* p, int64_t n, F v) { _mm512_mask_storeu_ps(p, first_lanes(n), v); }
  KTS_INLINE F set1(float v) { return _mm512_set1_ps(v); }
  KTS_INLINE F zero() { return _mm512_setzero_ps(); }
  KTS_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
  KTS_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  KTS_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  KTS_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
  KTS_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  KTS_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
  KTS_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
  KTS_INLINE F select_gt(F x, F y, F a, F b) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, y, _CMP_GT_OQ), b, a);
  }
  KTS_INLINE F round_even(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  KTS_INLINE float sum(F a) {
    const __m256 half8 = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(half8), _mm256_extractf128_ps(half8, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
  KTS_INLINE F pow2(F n) {
    const I biased = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(biased, 23));
  }
  KTS_INLINE F from_bf16(__m256i bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  KTS_INLINE F load_bf16(const bf16_t* p) { return from_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  KTS_INLINE F load_bf16_n(const bf16_t* p, int64_t n) {
    return from_bf16(_mm256_maskz_loadu_epi16(first_lanes(n), p));
  }
  KTS_INLINE __m256i to_bf16(F v) {
    const I bits = _mm512_castps_si512(v);
    const I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    I rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, is_nan, _mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
    return _mm512_cvtepi32_epi16(rounded);
  }
  KTS_INLINE void store_bf16(bf16_t* p, F v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16(v)); }
  KTS_INLINE void store_bf16_n(bf16_t* p, int64_t n, F v) { _mm256_mask_storeu_epi16(p, first_lanes(n), to_bf16(v)); }
  KTS_INLINE F from_f16(__m256i bits) { return _mm512_cvtph_ps(bits); }
  // min and max return their second operand for a NaN.
  KTS_INLINE __m256i to_f16(F v) {
    return _mm512_cvtps_ph(max(set1(-65504.0f), min(set1(65504.0f), v)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  KTS_INLINE F load_f16(const f16_t* p) { return from_f16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  KTS_INLINE F load_f16_n(const f16_t* p, int64_t n) { return from_f16(_mm256_maskz_loadu_epi16(first_lanes(n), p)); }
  KTS_INLINE void store_f16(f16_t* p, F v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_f16(v)); }
  KTS_INLINE void store_f16_n(f16_t* p, int64_t n, F v) { _mm256_mask_storeu_epi16(p, first_lanes(n), to_f16(v)); }
  KTS_INLINE I iota() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
  KTS_INLINE I set1_i(uint32_t v) { return _mm512_set1_epi32(static_cast<int>(v)); }
  KTS_INLINE I add_i(I a, I b) { return _mm512_add_epi32(a, b); }
  KTS_INLINE I xor_i(I a, I b) { return _mm512_xor_si512(a, b); }
  KTS_INLINE I mul_i(I a, I b) { return _mm512_mullo_epi32(a, b); }
  template <int N>
  KTS_INLINE I srl_i(I a) {
    return _mm512_srli_epi32(a, N);
  }
  KTS_INLINE F keep(I h, int32_t threshold, F v) {
    const __mmask16 kept = _mm512_cmpge_epi32_mask(_mm512_srli_epi32(h, 8), _mm512_set1_epi32(threshold));
    return _mm512_maskz_mov_ps(kept, v);
  }

  KTS_INLINE I load_i(const void* p) { return _mm512_loadu_si512(p); }
  KTS_INLINE void store_i(void* p, I v) { _mm512_storeu_si512(p, v); }
  KTS_INLINE I as_i(F v) { return _mm512_castps_si512(v); }
  KTS_INLINE F as_f(I v) { return _mm512_castsi512_ps(v); }
  KTS_INLINE F top_byte(I quads, int byte) {
    const __m128i control = _mm_load_si128(reinterpret_cast<const __m128i*>(kToTop[byte].control));
    return _mm512_cvtepi32_ps(_mm512_shuffle_epi8(quads, _mm512_broadcast_i32x4(control)));
  }
  KTS_INLINE I nibbles(I bytes, I mask, I bias) { return _mm512_sub_epi8(_mm512_and_si512(bytes, mask), bias); }
  KTS_INLINE F even(I pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
  KTS_INLINE F odd(I pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  // --- block types (block_weights_inl.h), as on AVX2 ---
  KTS_INLINE I load_table(const int8_t* table) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
  }
  KTS_INLINE I look_up(I table, I bytes) { return _mm512_shuffle_epi8(table, bytes); }
  KTS_INLINE I srl_by(I a, int count) { return _mm512_srl_epi32(a, _mm_cvtsi32_si128(count)); }
  KTS_INLINE I or_i(I a, I b) { return _mm512_or_si512(a, b); }
  KTS_INLINE I sub_i8(I a, I b) { return _mm512_sub_epi8(a, b); }
  KTS_INLINE F load_int8(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  KTS_INLINE F load_e8m0(const uint8_t* p) {
    const I e = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_max_epi32(_mm512_sub_epi32(e, set1_i(25)), _mm512_setzero_si512()), 23));
  }
  KTS_INLINE void transpose(I (&rows)[W]) {
    I pair[W], quad[W];
    for (int i = 0; i < W; i += 2) {
      pair[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
      pair[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < W; i += 4) {
      quad[i] = _mm512_unpacklo_epi64(pair[i], pair[i + 2]);
      quad[i + 1] = _mm512_unpackhi_epi64(pair[i], pair[i + 2]);
      quad[i + 2] = _mm512_unpacklo_epi64(pair[i + 1], pair[i + 3]);
      quad[i + 3] = _mm512_unpackhi_epi64(pair[i + 1], pair[i + 3]);
    }
    // quad[4 g + c], 128-bit lane l: column 4 l + c of rows 4 g .. 4 g + 3.
    for (int c = 0; c < 4; ++c) {
      const I low01 = _mm512_shuffle_i32x4(quad[c], quad[4 + c], 0x44);   // g0: l0 l1 | g1: l0 l1
      const I high01 = _mm512_shuffle_i32x4(quad[c], quad[4 + c], 0xee);  // g0: l2 l3 | g1: l2 l3
      const I low23 = _mm512_shuffle_i32x4(quad[8 + c], quad[12 + c], 0x44);
      const I high23 = _mm512_shuffle_i32x4(quad[8 + c], quad[12 + c], 0xee);
      rows[c] = _mm512_shuffle_i32x4(low01, low23, 0x88);
      rows[4 + c] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
      rows[8 + c] = _mm512_shuffle_i32x4(high01, high23, 0x88);
      rows[12 + c] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
    }
  }
  KTS_INLINE void interleave(F even, F odd, F* low, F* high) {
    const I low_index = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const I high_index = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    *low = _mm512_permutex2var_ps(even, low_index, odd);
    *high = _mm512_permutex2var_ps(even, high_index, odd);
  }
  KTS_INLINE void deinterleave(F low, F high, F* even, F* odd) {
    const I index = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    *even = _mm512_permutex2var_ps(low, index, high);
    *odd = _mm512_permutex2var_ps(low, _mm512_add_epi32(index, _mm512_set1_epi32(1)), high);
  }

  // --- gemv_bfp_inl.h ---
  KTS_INLINE I and_i(I a, I b) { return _mm512_and_si512(a, b); }
  template <int N>
  KTS_INLINE I sll_i16(I a) {
    return _mm512_slli_epi16(a, N);
  }
  template <int N>
  KTS_INLINE I srl_i16(I a) {
    return _mm512_srli_epi16(a, N);
  }
  template <int N>
  KTS_INLINE I sra_i16(I a) {
    return _mm512_srai_epi16(a, N);
  }
  KTS_INLINE I to_i32(F v) { return _mm512_cvtps_epi32(v); }
  KTS_INLINE F to_f32(I v) { return _mm512_cvtepi32_ps(v); }
  KTS_INLINE int32_t sum_i(I a) { return _mm512_reduce_add_epi32(a); }
  KTS_INLINE I set1_pair(const int16_t* p) {
    int32_t pair;
    std::memcpy(&pair, p, sizeof(pair));
    return _mm512_set1_epi32(pair);
  }
  KTS_INLINE I dot_i16(I sum, I a, I b) {
    sum = _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
    asm("" : "+v"(sum));  // as on AVX2
    return sum;
  }
  KTS_INLINE void store_i16_pairs(int16_t* p, I v) {
    const __m256i order =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_shuffle_epi8(_mm512_cvtepi32_epi16(v), order));
  }

  // --- quantize_inl.h ---
  KTS_INLINE I max_magnitude(I largest, const bf16_t* p) {
    return _mm512_max_epu16(largest, _mm512_and_si512(load_i(p), _mm512_set1_epi16(0x7fff)));
  }
  KTS_INLINE uint32_t largest_u16(I largest) {
    const I wide = _mm512_max_epu32(_mm512_srli_epi32(largest, 16), _mm512_and_si512(largest, set1_i(0xffff)));
    return static_cast<uint32_t>(_mm512_reduce_max_epu32(wide));
  }
  KTS_INLINE void store_int8(int8_t* q, F a, F b, F c, F d) {
    const F all[] = {a, b, c, d};
    for (int i = 0; i < 4; ++i)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(q + i * W), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(all[i])));
  }
};

}  // namespace kts::avx512
