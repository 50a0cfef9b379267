// bf16 rows, weights of the block types of GGUF files on AVX-512. Code in gemm_float_inl.h, dgrad_float_inl.h,
// block_weights_inl.h.
#include "../dgrad_float_inl.h"
#include "../gemv_bfp_blocks_inl.h"
#include "../vec_avx512.h"

namespace kts::avx512 {

void gemm_bf16_b4_f32_12x32_avx512(const GemmTask& task) { gemm_float_forward<Vec, BlockWeights<Vec, 4>, 12>(task); }
void gemv_bf16_b4_f32_4x32_avx512(const GemmTask& task) { gemv_float_forward<Vec, BlockWeights<Vec, 4>>(task); }
void gemv_bfp16_b4_f32_4x32_avx512(const GemmTask& task) { gemv_bfp_blocks<Vec, BlockWeights<Vec, 4>>(task); }
void dgrad_bf16_b4_f32_12x32_avx512(const GemmTask& task) { dgrad_widened<Vec, BlockWeights<Vec, 4>, 12>(task); }

}  // namespace kts::avx512
