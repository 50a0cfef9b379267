// bf16 on AVX2 + FMA: 6 rows x 16 columns = 12 sums + 2 weights + 1 broadcast = 15 of 16 registers. Code in
// gemm_bf16_inl.h.
#include "../gemm_bf16_inl.h"
#include "../vec_avx2.h"

namespace kts::avx2 {

void gemm_bf16_bf16_f32_6x16_avx2(const GemmTask& task) { gemm_bf16_forward<Vec, 6>(task); }
void dgrad_bf16_bf16_f32_6x16_avx2(const GemmTask& task) { gemm_bf16_input_grad<Vec, 6>(task); }

}  // namespace kts::avx2
