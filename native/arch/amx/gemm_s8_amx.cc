// int8 rows on AMX-INT8 (TDPBSSD: signed x signed, exact int32 sums for k up to 131071). int8 tiles are B operands as they
// are; int4 weights are unpacked to int8 tiles in scratch once for all rows of a task. Scales are applied as the scalar
// rows do, so results have equal bits. Code in tile_nest.h.
#include "operands_avx512.h"
#include "tile_nest.h"
#include "tile_op_hw.h"

namespace kts::amx {

void gemm_s8_s8_f32_32x32_amx(const GemmTask& task) {
  forward_s8_rows<TileOpHw, OperandsAvx512, Format::kInt8, TileShape::kFull>(task);
}

void gemm_s8_s4_f32_32x32_amx(const GemmTask& task) {
  KTS_DCHECK(task.w != nullptr);
  if (task.w->format.group < kTileKQ)
    forward_s8_rows<TileOpHw, OperandsAvx512, Format::kInt4, TileShape::kHalf>(task);
  else
    forward_s8_rows<TileOpHw, OperandsAvx512, Format::kInt4, TileShape::kFull>(task);
}

}  // namespace kts::amx
