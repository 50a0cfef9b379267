// int8 and int4 weights as bf16 tiles, on AVX-512 F, BW.
#pragma once
#include "../vec_avx512.h"
#include "kts/packed.h"

namespace kts::avx512 {

// Two f32 whose low halves are zero -> dwords (low: a, high: b).
KTS_INLINE __m512i pair_of_exact(__m512 a, __m512 b) {
  return _mm512_or_si512(_mm512_castps_si512(b), _mm512_srli_epi32(_mm512_castps_si512(a), 16));
}

// The same of any finite a and b, rounded to nearest even.
KTS_INLINE __m512i pair_of_rounded(__m512 a, __m512 b) {
  const auto rounded = [](__m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  };
  return _mm512_or_si512(_mm512_slli_epi32(_mm512_srli_epi32(rounded(b), 16), 16), _mm512_srli_epi32(rounded(a), 16));
}

// Byte kByte of every dword, signed.
template <int kByte>
KTS_INLINE __m512 byte_f32(__m512i x) {
  if constexpr (kByte < 3) x = _mm512_slli_epi32(x, 24 - 8 * kByte);
  return _mm512_cvtepi32_ps(_mm512_srai_epi32(x, 24));
}

// The half `kHigh` of byte kByte of every dword, less 8, times the scale of its n. vpermps reads four bits of an index.
template <int kByte, bool kHigh>
KTS_INLINE __m512 nibble_f32(__m512i x, __m512 scale) {
  const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  return _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(x, 8 * kByte + 4 * kHigh), values), scale);
}

// 4 k x 16 n of int8 -> two rows of 16 pairs: q, exact.
KTS_INLINE void pairs_of_int8(const uint8_t* from, __m512i* low, __m512i* high) {
  const __m512i x = _mm512_loadu_si512(from);
  *low = pair_of_exact(byte_f32<0>(x), byte_f32<1>(x));
  *high = pair_of_exact(byte_f32<2>(x), byte_f32<3>(x));
}

// 4 k x 16 n of int4 -> two rows of 16 pairs: q * scale, exact unless kRounds (WeightFormat::any_scale).
template <bool kHigh, bool kRounds>
KTS_INLINE void pairs_of_int4(const uint8_t* from, __m512 scale, __m512i* low, __m512i* high) {
  const __m512i x = _mm512_loadu_si512(from);
  const __m512 values[4] = {nibble_f32<0, kHigh>(x, scale), nibble_f32<1, kHigh>(x, scale),
                            nibble_f32<2, kHigh>(x, scale), nibble_f32<3, kHigh>(x, scale)};
  if constexpr (kRounds) {
    *low = pair_of_rounded(values[0], values[1]);
    *high = pair_of_rounded(values[2], values[3]);
  } else {
    *low = pair_of_exact(values[0], values[1]);
    *high = pair_of_exact(values[2], values[3]);
  }
}

// fn<kHigh, kRounds>() for the half bytes of k_tile and the scales of w.
template <class Fn>
KTS_INLINE void with_int4_half(const PackedMatrix& w, int64_t k_tile, Fn&& fn) {
  if (w.format.any_scale)
    k_tile % 2 == 0 ? fn.template operator()<false, true>() : fn.template operator()<true, true>();
  else
    k_tile % 2 == 0 ? fn.template operator()<false, false>() : fn.template operator()<true, false>();
}

// First byte of the 32 k of k_tile in the panel's left tile; the right tile is packed_tile_bytes further.
template <Format kFormat>
KTS_INLINE const uint8_t* quantised_rows(const PackedMatrix& w, int64_t n_panel, int64_t k_tile) {
  KTS_DCHECK(w.format.kind == kFormat && w.holds(n_panel * kPanel, k_tile * kTileK));
  constexpr int64_t kBytes = kFormat == Format::kInt8 ? kTileBytes : kTileBytesInt4;
  return w.panel(n_panel) + k_tile / 2 * 2 * kBytes + (kFormat == Format::kInt8 ? k_tile % 2 * kTileBytes / 2 : 0);
}

KTS_INLINE const bf16_t* group_scales(const PackedMatrix& w, int64_t n_panel, int64_t k_tile) {
  KTS_DCHECK(w.holds(n_panel * kPanel, k_tile * kTileK));
  return w.int4_scales(n_panel) + k_tile * kTileK / w.format.group * kPanel;
}

template <bool kHigh, bool kRounds>
KTS_INLINE void unpack_int4_tile(const uint8_t* from, __m512 scale, uint8_t* to) {
  for (int row = 0; row < 8; ++row) {
    __m512i low, high;
    pairs_of_int4<kHigh, kRounds>(from + row * 64, scale, &low, &high);
    _mm512_storeu_si512(to + row * 128, low);
    _mm512_storeu_si512(to + row * 128 + 64, high);
  }
}

// 32 n x 32 k -> the two bf16 tiles of a packed panel (2 KiB): q of int8, q * scale of int4.
template <Format kFormat>
KTS_INLINE void unpack_bf16_tiles(const PackedMatrix& w, int64_t n_panel, int64_t k_tile, uint8_t* to) {
  const uint8_t* from = quantised_rows<kFormat>(w, n_panel, k_tile);
  for (int half = 0; half < 2; ++half, to += kTileBytes) {
    if constexpr (kFormat == Format::kInt8) {
      for (int row = 0; row < 8; ++row) {
        __m512i low, high;
        pairs_of_int8(from + half * kTileBytes + row * 64, &low, &high);
        _mm512_storeu_si512(to + row * 128, low);
        _mm512_storeu_si512(to + row * 128 + 64, high);
      }
    } else {
      const __m512 scale = Vec::load_bf16(group_scales(w, n_panel, k_tile) + half * kTileN);
      with_int4_half(w, k_tile, [&]<bool kHigh, bool kRounds>() {
        unpack_int4_tile<kHigh, kRounds>(from + half * kTileBytesInt4, scale, to);
      });
    }
  }
}

}  // namespace kts::avx512
