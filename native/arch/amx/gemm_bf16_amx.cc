// bf16 rows on AMX-BF16: bf16 tiles are B operands as they are; int8 and int4 weights are unpacked to bf16 tiles in scratch
// once for all rows of a task, exactly (q; q * scale). Sums in f32; TDPBF16PS flushes denormals. Code in tile_nest.h.
#include "operands_avx512.h"
#include "tile_nest.h"
#include "tile_op_hw.h"

namespace kts::amx {

namespace {

template <Format kFormat>
void forward(const GemmTask& task) {
  forward_bf16_rows<TileOpHw, OperandsAvx512, kFormat>(task);
}

template <Format kFormat>
void input_grad(const GemmTask& task) {
  input_grad_bf16_rows<TileOpHw, OperandsAvx512, kFormat>(task);
}

}  // namespace

void gemm_bf16_bf16_f32_32x32_amx(const GemmTask& task) { forward<Format::kBf16>(task); }
void gemm_bf16_s8_f32_32x32_amx(const GemmTask& task) { forward<Format::kInt8>(task); }
void gemm_bf16_s4_f32_32x32_amx(const GemmTask& task) { forward<Format::kInt4>(task); }
void dgrad_bf16_bf16_f32_32x32_amx(const GemmTask& task) { input_grad<Format::kBf16>(task); }
void dgrad_bf16_s8_f32_32x32_amx(const GemmTask& task) { input_grad<Format::kInt8>(task); }
void dgrad_bf16_s4_f32_32x32_amx(const GemmTask& task) { input_grad<Format::kInt4>(task); }

}  // namespace kts::amx
