// What LDTILECFG loads, and the two shapes in use. Every tile of a shape has the full size: edges are padded with zeros
// in scratch, so a thread configures its tiles once for all blocks of a phase.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kts/base.h"

namespace kts::amx {

inline constexpr int kTiles = 8;
inline constexpr int kTileRows = 16;
inline constexpr int kTileRowBytes = 64;
inline constexpr int kFullTileBytes = kTileRows * kTileRowBytes;

// Layout fixed by the CPU (Intel SDM volume 1, section 18.2).
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);
static_assert(offsetof(TileConfig, row_bytes) == 16 && offsetof(TileConfig, rows) == 48);

// Tile ids: 0 1 / 2 3 are the 2 x 2 block of C (row-major), 4 5 the two row tiles of A, 6 7 the two column tiles of B.
inline constexpr int kTileC = 0, kTileA = 4, kTileB = 6;
static_assert(kTileB + 2 == kTiles);

enum class TileShape : int {
  kNone = 0,  // not configured
  kFull = 1,  // A 16 rows x 64 bytes, B 16 rows x 64 bytes: 32 bf16 or 64 int8 of the sum
  kHalf = 2,  // A 16 rows x 32 bytes, B  8 rows x 64 bytes: 32 int8 of the sum, for scales of 32 consecutive k
};

KTS_INLINE constexpr int tile_rows(TileShape shape, int tile) {
  return shape == TileShape::kHalf && tile >= kTileB ? kTileRows / 2 : kTileRows;
}
KTS_INLINE constexpr int tile_row_bytes(TileShape shape, int tile) {
  return shape == TileShape::kHalf && tile >= kTileA && tile < kTileB ? kTileRowBytes / 2 : kTileRowBytes;
}

KTS_INLINE constexpr TileConfig tile_config(TileShape shape) {
  TileConfig config;
  for (int tile = 0; tile < kTiles; ++tile) {
    config.rows[tile] = static_cast<uint8_t>(tile_rows(shape, tile));
    config.row_bytes[tile] = static_cast<uint16_t>(tile_row_bytes(shape, tile));
  }
  return config;
}

// Loads the configuration unless this thread has it already.
void configure_tiles(TileShape shape);
// Gives this thread's tiles up. To be called at the end of a phase: between phases other libraries load configurations
// of their own, which would leave the thread's note of what is loaded wrong.
void release_tiles();

}  // namespace kts::amx
