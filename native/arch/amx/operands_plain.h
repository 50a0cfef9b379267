// What the nests do around the tile instructions, in plain C++: the readable meaning of operands_avx512.h, for tests.
#pragma once
#include <cmath>
#include <cstring>

#include "kts/packed.h"
#include "tile_config.h"

namespace kts::amx {

struct OperandsPlain {
  // Rows i < 32 of a, elements begin .. begin + valid of each readable, as A stream: step t, row tile i / 16, row i % 16
  // holds the step_bytes bytes of piece t. Zeros beyond `valid` and in rows that pad the last tile.
  template <class T>
  static void gather_rows(const T* const* rows, int64_t count, int64_t begin, int64_t valid, int64_t steps,
                          int64_t step_bytes, uint8_t* to) {
    const int64_t width = step_bytes / static_cast<int64_t>(sizeof(T));
    for (int64_t i = 0; i < align_up(count, kTileRows); ++i)
      for (int64_t e = 0; e < steps * width; ++e) {
        const T value = i < count && e < valid ? rows[i][begin + e] : T{0};
        const int64_t tile = e / width * 2 + i / kTileRows;
        std::memcpy(to + (tile * kTileRows + i % kTileRows) * step_bytes + e % width * static_cast<int64_t>(sizeof(T)),
                    &value, sizeof(T));
      }
  }

  // Rows of dy, times scales (if any) and rounded, as B stream of c^T: step t of 32 n, column tile i / 16, row j, dword
  // i % 16 is the pair (dy[i, 32 t + j], dy[i, 32 t + j + 16]).
  static void gather_pairs(const bf16_t* const* rows, int64_t count, int64_t begin, int64_t valid, int64_t steps,
                           const float* scales, uint8_t* to) {
    bf16_t* out = reinterpret_cast<bf16_t*>(to);
    for (int64_t i = 0; i < align_up(count, kTileRows); ++i)
      for (int64_t n = 0; n < steps * kPanel; ++n) {
        bf16_t value = i < count && n < valid ? rows[i][begin + n] : bf16_t{0};
        if (scales != nullptr && n < valid) value = f32_to_bf16(bf16_to_f32(value) * scales[n]);
        const int64_t tile = n / kPanel * 2 + i / kTileRows, j = n % kTileN, half = n % kPanel / kTileN;
        out[tile * kTileElements + j * 32 + i % kTileRows * 2 + half] = value;
      }
  }

  // The two bf16 tiles of a panel [16 k-pairs][16 n][2] -> A stream step of c^T: row tile k / 16, row k % 16, dword j is
  // the pair (W[j, k], W[j + 16, k]).
  static void split_pairs(const uint8_t* from, uint8_t* to) {
    const bf16_t* in = reinterpret_cast<const bf16_t*>(from);
    bf16_t* out = reinterpret_cast<bf16_t*>(to);
    for (int k = 0; k < kTileK; ++k)
      for (int n = 0; n < kPanel; ++n)
        out[k * 32 + n % kTileN * 2 + n / kTileN] =
            in[n / kTileN * kTileElements + k / 2 * 32 + n % kTileN * 2 + k % 2];
  }

  // 32 n x 32 k of int8 (q) or int4 (q * scale) weights as the two bf16 tiles of a packed panel.
  template <Format kFormat>
  static void unpack_bf16(const PackedMatrix& w, int64_t n_panel, int64_t k_tile, uint8_t* to) {
    bf16_t* out = reinterpret_cast<bf16_t*>(to);
    for (int64_t n = 0; n < kPanel; ++n)
      for (int64_t k = 0; k < kTileK; ++k) {
        const int64_t row = n_panel * kPanel + n, col = k_tile * kTileK + k;
        const bool inside = row < w.n && col < w.k;
        out[n / kTileN * kTileElements + k / 2 * 32 + n % kTileN * 2 + k % 2] =
            f32_to_bf16(inside ? packed_unscaled(w, row, col) : 0.0f);
      }
  }

  // A step of int4 weights as the two int8 B tiles of a panel.
  template <TileShape kShape>
  static void unpack_s8(const PackedMatrix& w, int64_t n_panel, int64_t step, uint8_t* to) {
    constexpr int64_t kStepK = kShape == TileShape::kHalf ? 32 : 64;
    for (int64_t n = 0; n < kPanel; ++n)
      for (int64_t k = 0; k < kStepK; ++k) {
        const int64_t row = n_panel * kPanel + n, col = step * kStepK + k;
        const int q = row < w.n && col < w.k ? packed_integer(w, row, col) : 0;
        to[n / kTileN * kTileN * kStepK + k / 4 * 64 + n % kTileN * 4 + k % 4] = static_cast<uint8_t>(q);
      }
  }

  // c [rows, 32] *= scales [32]
  static void scale_columns(const float* scales, int64_t rows, float* c, int64_t ldc) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < kPanel; ++j) c[i * ldc + j] *= scales[j];
  }

  // c [rows, 32] holds int32 sums; c = sum * column scale * row scale
  static void scale_sums(const float* scales, const float* row_scales, int64_t rows, float* c, int64_t ldc) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < kPanel; ++j) {
        int32_t sum;
        std::memcpy(&sum, c + i * ldc + j, sizeof(sum));
        c[i * ldc + j] = std::fma(static_cast<float>(sum), scales[j], 0.0f) * row_scales[i];
      }
  }

  // c [rows, 32] (+)= sums [rows][32] (int32) * scales
  static void add_group(const float* sums, const bf16_t* scales, bool first, int64_t rows, float* c, int64_t ldc) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < kPanel; ++j) {
        int32_t sum;
        std::memcpy(&sum, sums + i * kPanel + j, sizeof(sum));
        c[i * ldc + j] = std::fma(static_cast<float>(sum), bf16_to_f32(scales[j]), first ? 0.0f : c[i * ldc + j]);
      }
  }

  // c [rows, 32] *= row_scales
  static void scale_rows(const float* row_scales, int64_t rows, float* c, int64_t ldc) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < kPanel; ++j) c[i * ldc + j] *= row_scales[i];
  }

  // c [rows, 32] (+)= transpose of sums [16 k_tiles, rows]; zeros in the columns of an absent second tile.
  static void add_transposed(const float* sums, int64_t stride, int64_t k_tiles, int64_t rows, float* c, int64_t ldc,
                             bool accumulate) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < kPanel; ++j) {
        const float sum = j < k_tiles * kTileRows ? sums[j * stride + i] : 0.0f;
        c[i * ldc + j] = accumulate ? c[i * ldc + j] + sum : sum;
      }
  }
};

}  // namespace kts::amx
