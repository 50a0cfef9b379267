// int8 rows on AVX2, which has no dot product of bytes. int8 weights: int16 products of pairs (vpmaddwd), 4 k as (k0, k2)
// and (k1, k3); 6 rows x 16 columns = 12 sums + 2 weights + 1 broadcast + 1 product of 16 registers. int4: unsigned
// nibbles times signed rows (vpmaddubsw), 32 k summed in int16: 8 * 2 * 15 * 127 < 2^15. Code in gemm_s8_inl.h.
#include "../gemm_s8_inl.h"
#include "../vec_avx2.h"

namespace kts::avx2 {

struct Dot {
  using V = Vec;
  using I = V::I;
  static constexpr int kParts = 2;
  static constexpr int kDotLatency = 1;  // of the addition that follows the product
  static constexpr bool kNarrowInt4Sums = true;

  KTS_INLINE I load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  KTS_INLINE void store(void* p, I v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
  KTS_INLINE I broadcast(const void* p) {
    return _mm256_castps_si256(_mm256_broadcast_ss(static_cast<const float*>(p)));
  }
  KTS_INLINE V::F to_f32(I v) { return _mm256_cvtepi32_ps(v); }

  // The pair (k0, k2) or (k1, k3) of every dword.
  KTS_INLINE I row_part(I bytes, int part) {
    return _mm256_srai_epi16(part == 0 ? _mm256_slli_epi16(bytes, 8) : bytes, 8);
  }
  template <bool kUnpacked>
  KTS_INLINE I weights(const uint8_t* p, int part) {
    return kUnpacked ? load(p + part * kRowOfTile) : row_part(load(p), part);
  }
  KTS_INLINE I start(const int32_t*) { return _mm256_setzero_si256(); }
  // The additions are not intrinsics: g++ 12 regroups the sums of unrolled iterations, whose products then spill.
  KTS_INLINE I dot_int8(I sum, I x, I w) {
    __asm__("vpaddd %1, %0, %0" : "+x"(sum) : "x"(_mm256_madd_epi16(x, w)));
    return sum;
  }

  template <bool kUnpacked, bool kHigh>
  KTS_INLINE I nibbles(const uint8_t* p) {
    if (kUnpacked) return load(p);
    return _mm256_and_si256(kHigh ? _mm256_srli_epi16(load(p), 4) : load(p), _mm256_set1_epi8(15));
  }
  KTS_INLINE I dot_int4(I sum, I w, I x) {
    __asm__("vpaddw %1, %0, %0" : "+x"(sum) : "x"(_mm256_maddubs_epi16(w, x)));
    return sum;
  }
  KTS_INLINE I int4_sums(I sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }
};

void gemm_s8_s8_f32_6x16_avx2(const GemmTask& task) {
  gemm_int8_rows<Int8RowsPlan<Dot, Format::kInt8, 6, false>>(task);
}
void gemm_s8_s4_f32_6x16_avx2(const GemmTask& task) {
  gemm_int8_rows<Int8RowsPlan<Dot, Format::kInt4, 6, false>>(task);
}
void gemv_s8_s8_f32_4x16_avx2(const GemmTask& task) { gemm_int8_rows<Int8RowsPlan<Dot, Format::kInt8, 4, true>>(task); }
void gemv_s8_s4_f32_4x16_avx2(const GemmTask& task) { gemm_int8_rows<Int8RowsPlan<Dot, Format::kInt4, 4, true>>(task); }

}  // namespace kts::avx2
