// What the nests do around the tile instructions, on AVX-512 F, BW, DQ, VL. The meaning of every function is in
// operands_plain.h.
#pragma once
#include "../avx512/unpack_avx512.h"
#include "../vec_avx512.h"
#include "tile_config.h"

namespace kts::amx {

using avx512::Vec;

struct OperandsAvx512 {
  KTS_INLINE __mmask64 first_bytes(int64_t n) { return n >= 64 ? ~__mmask64{0} : n <= 0 ? 0 : (__mmask64{1} << n) - 1; }

  template <class T>
  static void gather_rows(const T* const* rows, int64_t count, int64_t begin, int64_t valid, int64_t steps,
                          int64_t step_bytes, uint8_t* to) {
    const int64_t valid_bytes = valid * static_cast<int64_t>(sizeof(T)), stride = 2 * kTileRows * step_bytes;
    const __mmask64 step_mask = first_bytes(step_bytes);
    for (int64_t i = 0; i < align_up(count, kTileRows); ++i) {
      uint8_t* row = to + i * step_bytes;
      const uint8_t* from = i < count ? reinterpret_cast<const uint8_t*>(rows[i] + begin) : nullptr;
      for (int64_t t = 0; t < steps; ++t) {
        const __mmask64 readable = from == nullptr ? 0 : first_bytes(valid_bytes - t * step_bytes);
        const __m512i bytes = _mm512_maskz_loadu_epi8(readable & step_mask, from + t * step_bytes);
        _mm512_mask_storeu_epi8(row + t * stride, step_mask, bytes);
      }
    }
  }

  // The pairs (n, n + 16) of one row of dy.
  KTS_INLINE __m512i row_pairs(const bf16_t* row, int64_t valid, const float* scales) {
    const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                                6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __mmask32 readable = valid >= 32 ? ~__mmask32{0} : (__mmask32{1} << valid) - 1;
    const __m512i raw = _mm512_maskz_loadu_epi16(readable, row);
    if (scales == nullptr) return _mm512_permutexvar_epi16(interleave, raw);
    const __m512 low = _mm512_mul_ps(Vec::from_bf16(_mm512_castsi512_si256(raw)), Vec::load(scales));
    const __m512 high = _mm512_mul_ps(Vec::from_bf16(_mm512_extracti64x4_epi64(raw, 1)), Vec::load(scales + kTileN));
    const __m512i rounded = _mm512_inserti64x4(_mm512_castsi256_si512(Vec::to_bf16(low)), Vec::to_bf16(high), 1);
    return _mm512_permutexvar_epi16(interleave, rounded);
  }

  static void gather_pairs(const bf16_t* const* rows, int64_t count, int64_t begin, int64_t valid, int64_t steps,
                           const float* scales, uint8_t* to) {
    for (int64_t i = 0; i < count; i += kTileRows) {
      const int64_t here = min_i64(kTileRows, count - i);
      for (int64_t t = 0; t < steps; ++t) {
        const int64_t n = t * kPanel;
        __m512i x[kTileRows];
#pragma GCC unroll 16
        for (int64_t r = 0; r < kTileRows; ++r)
          x[r] = r < here ? row_pairs(rows[i + r] + begin + n, valid - n, scales == nullptr ? nullptr : scales + n)
                          : _mm512_setzero_si512();
        Vec::transpose(x);
        uint8_t* tile = to + (t * 2 + i / kTileRows) * kFullTileBytes;
#pragma GCC unroll 16
        for (int r = 0; r < kTileRows; ++r) _mm512_storeu_si512(tile + r * kTileRowBytes, x[r]);
      }
    }
  }

  static void split_pairs(const uint8_t* from, uint8_t* to) {
    constexpr __mmask32 kHighWords = 0xaaaaaaaau;
    for (int pair = 0; pair < kTileK / 2; ++pair) {
      const __m512i left = _mm512_loadu_si512(from + pair * 64);
      const __m512i right = _mm512_loadu_si512(from + kTileBytes + pair * 64);
      const __m512i even = _mm512_mask_blend_epi16(kHighWords, left, _mm512_slli_epi32(right, 16));
      const __m512i odd = _mm512_mask_blend_epi16(kHighWords, _mm512_srli_epi32(left, 16), right);
      _mm512_storeu_si512(to + pair * 128, even);
      _mm512_storeu_si512(to + pair * 128 + 64, odd);
    }
  }

  template <Format kFormat>
  static void unpack_bf16(const PackedMatrix& w, int64_t n_panel, int64_t k_tile, uint8_t* to) {
    avx512::unpack_bf16_tiles<kFormat>(w, n_panel, k_tile, to);
  }

  template <TileShape kShape>
  static void unpack_s8(const PackedMatrix& w, int64_t n_panel, int64_t step, uint8_t* to) {
    const __m512i mask = _mm512_set1_epi8(15), eight = _mm512_set1_epi8(8);
    const int64_t k_tile = kShape == TileShape::kHalf ? step : 2 * step;
    const uint8_t* from = avx512::quantised_rows<Format::kInt4>(w, n_panel, k_tile);
    for (int half = 0; half < 2; ++half, from += kTileBytesInt4)
      for (int row = 0; row < 8; ++row) {
        const __m512i bytes = _mm512_loadu_si512(from + row * 64);
        const __m512i low = _mm512_sub_epi8(_mm512_and_si512(bytes, mask), eight);
        const __m512i high = _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(bytes, 4), mask), eight);
        if constexpr (kShape == TileShape::kHalf) {
          _mm512_storeu_si512(to + half * kFullTileBytes / 2 + row * 64, step % 2 == 0 ? low : high);
        } else {
          _mm512_storeu_si512(to + half * kFullTileBytes + row * 64, low);
          _mm512_storeu_si512(to + half * kFullTileBytes + 512 + row * 64, high);
        }
      }
  }

  static void scale_columns(const float* scales, int64_t rows, float* c, int64_t ldc) {
    const __m512 left = Vec::load(scales), right = Vec::load(scales + 16);
    for (int64_t i = 0; i < rows; ++i, c += ldc) {
      Vec::store(c, Vec::mul(Vec::load(c), left));
      Vec::store(c + 16, Vec::mul(Vec::load(c + 16), right));
    }
  }

  static void scale_sums(const float* scales, const float* row_scales, int64_t rows, float* c, int64_t ldc) {
    for (int64_t i = 0; i < rows; ++i, c += ldc)
      for (int j = 0; j < kPanel; j += 16) {
        const __m512 sum = _mm512_cvtepi32_ps(_mm512_loadu_si512(c + j));
        const __m512 value = Vec::fma(sum, Vec::load(scales + j), Vec::zero());
        Vec::store(c + j, Vec::mul(value, Vec::set1(row_scales[i])));
      }
  }

  static void add_group(const float* sums, const bf16_t* scales, bool first, int64_t rows, float* c, int64_t ldc) {
    const __m512 left = Vec::load_bf16(scales), right = Vec::load_bf16(scales + 16);
    for (int64_t i = 0; i < rows; ++i, c += ldc, sums += kPanel) {
      const __m512 a = _mm512_cvtepi32_ps(_mm512_loadu_si512(sums));
      const __m512 b = _mm512_cvtepi32_ps(_mm512_loadu_si512(sums + 16));
      Vec::store(c, Vec::fma(a, left, first ? Vec::zero() : Vec::load(c)));
      Vec::store(c + 16, Vec::fma(b, right, first ? Vec::zero() : Vec::load(c + 16)));
    }
  }

  static void scale_rows(const float* row_scales, int64_t rows, float* c, int64_t ldc) {
    for (int64_t i = 0; i < rows; ++i, c += ldc)
      for (int j = 0; j < kPanel; j += 16) Vec::store(c + j, Vec::mul(Vec::load(c + j), Vec::set1(row_scales[i])));
  }

  static void add_transposed(const float* sums, int64_t stride, int64_t k_tiles, int64_t rows, float* c, int64_t ldc,
                             bool accumulate) {
    for (int64_t i = 0; i < rows; i += kTileRows)
      for (int64_t tile = 0; tile < 2; ++tile) {
        __m512i x[kTileRows];
#pragma GCC unroll 16
        for (int64_t r = 0; r < kTileRows; ++r)
          x[r] =
              tile < k_tiles ? _mm512_loadu_si512(sums + (tile * kTileRows + r) * stride + i) : _mm512_setzero_si512();
        Vec::transpose(x);
        const int64_t here = min_i64(kTileRows, rows - i);
#pragma GCC unroll 16
        for (int64_t r = 0; r < kTileRows; ++r) {
          if (r >= here) break;
          float* to = c + (i + r) * ldc + tile * kTileN;
          const __m512 sum = _mm512_castsi512_ps(x[r]);
          Vec::store(to, accumulate ? Vec::add(Vec::load(to), sum) : sum);
        }
      }
  }
};

}  // namespace kts::amx
