// Row-major bf16 -> tile order (formula in kts/gemm.h) and back. Copies bits: the round trip is exact.
#include <cstring>

#include "kts/gemm.h"

namespace kts {

int64_t packed_bytes(Format format, int64_t n, int64_t k) {
  KTS_CHECK(format == Format::kBf16, "packed_bytes: unknown weight format");
  return align_up(n, kPanel) * align_up(k, kTileK) * static_cast<int64_t>(sizeof(bf16_t));
}

namespace {

// A dword of a tile is (k even, k odd) of one n.
void pack_tile(const bf16_t* w, int64_t stride, int64_t rows, int64_t cols, bf16_t* tile) {
  if (rows < kTileN || cols < kTileK) std::memset(tile, 0, kTileElements * sizeof(bf16_t));
  for (int64_t i = 0; i < rows; ++i) {
    const bf16_t* from = w + i * stride;
    bf16_t* to = tile + 2 * i;
    int64_t j = 0;
    for (; j + 2 <= cols; j += 2) std::memcpy(to + j * kTileN, from + j, 2 * sizeof(bf16_t));
    if (j < cols) to[j * kTileN] = from[j];
  }
}

void unpack_tile(const bf16_t* tile, int64_t rows, int64_t cols, bf16_t* w, int64_t stride) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) w[i * stride + j] = tile[(j / 2) * 2 * kTileN + 2 * i + j % 2];
}

// Calls fn(tile index, first row, rows, first column, columns) for every tile of the panels that holds matrix elements;
// the index alone for tiles that are padding.
template <class Fn>
void for_tiles(int64_t n, int64_t k, int64_t panel_begin, int64_t panel_end, Fn&& fn) {
  const int64_t k_tiles = ceil_div(k, kTileK);
  for (int64_t p = panel_begin; p < panel_end; ++p)
    for (int64_t kt = 0; kt < k_tiles; ++kt)
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t row = p * kPanel + half * kTileN, col = kt * kTileK;
        const int64_t rows = row < n ? min_i64(kTileN, n - row) : 0;
        fn((p * k_tiles + kt) * 2 + half, row, rows, col, min_i64(kTileK, k - col));
      }
}

}  // namespace

void pack_panels(const bf16_t* w, int64_t stride, int64_t n, int64_t k, int64_t panel_begin, int64_t panel_end,
                 void* packed) {
  bf16_t* tiles = static_cast<bf16_t*>(packed);
  for_tiles(n, k, panel_begin, panel_end, [&](int64_t tile, int64_t row, int64_t rows, int64_t col, int64_t cols) {
    pack_tile(rows > 0 ? w + row * stride + col : nullptr, stride, rows, cols, tiles + tile * kTileElements);
  });
}

void unpack_panels(const PackedMatrix& packed, int64_t panel_begin, int64_t panel_end, bf16_t* w, int64_t stride) {
  const bf16_t* tiles = static_cast<const bf16_t*>(packed.data);
  for_tiles(packed.n, packed.k, panel_begin, panel_end,
            [&](int64_t tile, int64_t row, int64_t rows, int64_t col, int64_t cols) {
              if (rows > 0) unpack_tile(tiles + tile * kTileElements, rows, cols, w + row * stride + col, stride);
            });
}

}  // namespace kts
