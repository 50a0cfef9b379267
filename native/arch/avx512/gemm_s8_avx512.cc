// int8 rows on AVX-512 without VNNI: the products of avx2/gemm_s8_avx2.cc on 16 lanes; 12 rows x 32 columns = 24 sums +
// 2 weights + 1 broadcast + 2 products of 32 registers. Code in gemm_s8_inl.h.
#include "../gemm_s8_inl.h"
#include "../vec_avx512.h"

namespace kts::avx512 {

struct Dot {
  using V = Vec;
  using I = V::I;
  static constexpr int kParts = 2;
  static constexpr int kDotLatency = 1;  // of the addition that follows the product
  static constexpr bool kNarrowInt4Sums = true;

  KTS_INLINE I load(const void* p) { return _mm512_loadu_si512(p); }
  KTS_INLINE void store(void* p, I v) { _mm512_storeu_si512(p, v); }
  KTS_INLINE I broadcast(const void* p) { return _mm512_castps_si512(_mm512_set1_ps(*static_cast<const float*>(p))); }
  KTS_INLINE V::F to_f32(I v) { return _mm512_cvtepi32_ps(v); }

  KTS_INLINE I row_part(I bytes, int part) {
    return _mm512_srai_epi16(part == 0 ? _mm512_slli_epi16(bytes, 8) : bytes, 8);
  }
  template <bool kUnpacked>
  KTS_INLINE I weights(const uint8_t* p, int part) {
    return kUnpacked ? load(p + part * kRowOfTile) : row_part(load(p), part);
  }
  KTS_INLINE I start(const int32_t*) { return _mm512_setzero_si512(); }
  // The additions are not intrinsics: g++ 12 regroups the sums of unrolled iterations, whose products then spill.
  KTS_INLINE I dot_int8(I sum, I x, I w) {
    __asm__("vpaddd %1, %0, %0" : "+v"(sum) : "v"(_mm512_madd_epi16(x, w)));
    return sum;
  }

  template <bool kUnpacked, bool kHigh>
  KTS_INLINE I nibbles(const uint8_t* p) {
    if (kUnpacked) return load(p);
    return _mm512_and_si512(kHigh ? _mm512_srli_epi16(load(p), 4) : load(p), _mm512_set1_epi8(15));
  }
  KTS_INLINE I dot_int4(I sum, I w, I x) {
    __asm__("vpaddw %1, %0, %0" : "+v"(sum) : "v"(_mm512_maddubs_epi16(w, x)));
    return sum;
  }
  KTS_INLINE I int4_sums(I sum) { return _mm512_madd_epi16(sum, _mm512_set1_epi16(1)); }
};

void gemm_s8_s8_f32_12x32_avx512(const GemmTask& task) {
  gemm_int8_rows<Int8RowsPlan<Dot, Format::kInt8, 12, false>>(task);
}
void gemm_s8_s4_f32_12x32_avx512(const GemmTask& task) {
  gemm_int8_rows<Int8RowsPlan<Dot, Format::kInt4, 12, false>>(task);
}
void gemv_s8_s8_f32_4x32_avx512(const GemmTask& task) {
  gemm_int8_rows<Int8RowsPlan<Dot, Format::kInt8, 4, true>>(task);
}
void gemv_s8_s4_f32_4x32_avx512(const GemmTask& task) {
  gemm_int8_rows<Int8RowsPlan<Dot, Format::kInt4, 4, true>>(task);
}

}  // namespace kts::avx512
