// bf16 rows, weights of the block types of GGUF files on AVX2 + FMA. Code in gemm_float_inl.h, dgrad_float_inl.h,
// block_weights_inl.h.
#include "../dgrad_float_inl.h"
#include "../gemv_bfp_blocks_inl.h"
#include "../vec_avx2.h"

namespace kts::avx2 {

void gemm_bf16_b6_f32_6x16_avx2(const GemmTask& task) { gemm_float_forward<Vec, BlockWeights<Vec, 6>, 6>(task); }
void gemv_bf16_b6_f32_4x16_avx2(const GemmTask& task) { gemv_float_forward<Vec, BlockWeights<Vec, 6>>(task); }
void gemv_bfp16_b6_f32_4x16_avx2(const GemmTask& task) { gemv_bfp_blocks<Vec, BlockWeights<Vec, 6>>(task); }
void dgrad_bf16_b6_f32_6x16_avx2(const GemmTask& task) { dgrad_widened<Vec, BlockWeights<Vec, 6>, 6>(task); }

}  // namespace kts::avx2
