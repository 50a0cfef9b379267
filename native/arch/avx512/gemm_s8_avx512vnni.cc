// int8 rows on AVX-512 VNNI: 4 k of 16 columns per vpdpbusd, unsigned x signed. int8: rows read as q + 128 are the
// unsigned operand; int4: nibbles are. 12 rows x 32 columns = 24 sums + 2 weights + 1 broadcast of 32 registers. Code in
// gemm_s8_inl.h.
#include "../gemm_s8_inl.h"
#include "../vec_avx512.h"

namespace kts::avx512vnni {

struct Dot {
  using V = avx512::Vec;
  using I = V::I;
  static constexpr int kParts = 1;
  static constexpr int kDotLatency = 5;
  static constexpr bool kNarrowInt4Sums = false;

  KTS_INLINE I load(const void* p) { return _mm512_loadu_si512(p); }
  KTS_INLINE void store(void* p, I v) { _mm512_storeu_si512(p, v); }
  KTS_INLINE I broadcast(const void* p) { return _mm512_castps_si512(_mm512_set1_ps(*static_cast<const float*>(p))); }
  KTS_INLINE V::F to_f32(I v) { return _mm512_cvtepi32_ps(v); }
  // Not the intrinsic: g++ 12 spills the sums of _mm512_dpbusd_epi32, at less than half of the speed.
  KTS_INLINE I dot(I sum, I u8, I s8) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u8), "v"(s8));
    return sum;
  }

  KTS_INLINE I row_part(I bytes, int) { return _mm512_xor_si512(bytes, _mm512_set1_epi8(-128)); }
  template <bool kUnpacked>
  KTS_INLINE I weights(const uint8_t* p, int) {
    return load(p);
  }
  KTS_INLINE I start(const int32_t* column_sums) { return V::mul_i(load(column_sums), _mm512_set1_epi32(-128)); }
  KTS_INLINE I dot_int8(I sum, I x, I w) { return dot(sum, x, w); }

  template <bool kUnpacked, bool kHigh>
  KTS_INLINE I nibbles(const uint8_t* p) {
    if (kUnpacked) return load(p);
    return _mm512_and_si512(kHigh ? _mm512_srli_epi16(load(p), 4) : load(p), _mm512_set1_epi8(15));
  }
  KTS_INLINE I dot_int4(I sum, I w, I x) { return dot(sum, w, x); }
};

void gemm_s8_s8_f32_12x32_avx512vnni(const GemmTask& task) {
  gemm_int8_rows<Int8RowsPlan<Dot, Format::kInt8, 12, false>>(task);
}
void gemm_s8_s4_f32_12x32_avx512vnni(const GemmTask& task) {
  gemm_int8_rows<Int8RowsPlan<Dot, Format::kInt4, 12, false>>(task);
}
void gemv_s8_s8_f32_4x32_avx512vnni(const GemmTask& task) {
  gemm_int8_rows<Int8RowsPlan<Dot, Format::kInt8, 4, true>>(task);
}
void gemv_s8_s4_f32_4x32_avx512vnni(const GemmTask& task) {
  gemm_int8_rows<Int8RowsPlan<Dot, Format::kInt4, 4, true>>(task);
}

}  // namespace kts::avx512vnni
