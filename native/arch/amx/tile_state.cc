// The tile configuration of a thread. Permission for the tile state is the process's: gemm/isa.cc asks for it.
#include "tile_config.h"

namespace kts::amx {

namespace {

thread_local TileShape loaded_shape = TileShape::kNone;

constexpr TileConfig kConfigs[] = {{}, tile_config(TileShape::kFull), tile_config(TileShape::kHalf)};

}  // namespace

void configure_tiles(TileShape shape) {
  if (loaded_shape == shape) return;
  __asm__ volatile("ldtilecfg %0" ::"m"(kConfigs[static_cast<int>(shape)]));
  loaded_shape = shape;
}

void release_tiles() {
  if (loaded_shape == TileShape::kNone) return;
  __asm__ volatile("tilerelease");
  loaded_shape = TileShape::kNone;
}

}  // namespace kts::amx
