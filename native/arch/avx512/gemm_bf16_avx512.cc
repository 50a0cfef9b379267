// bf16 on AVX-512: 12 rows x 32 columns = 24 sums + 2 weight pairs + 2 weights of 32 registers; a is broadcast from
// memory by the multiply-add itself. Code in gemm_bf16_inl.h.
#include "../gemm_bf16_inl.h"
#include "../vec_avx512.h"

namespace kts::avx512 {

void gemm_bf16_bf16_f32_12x32_avx512(const GemmTask& task) { gemm_bf16_forward<Vec, 12>(task); }
void dgrad_bf16_bf16_f32_12x32_avx512(const GemmTask& task) { gemm_bf16_input_grad<Vec, 12>(task); }

}  // namespace kts::avx512
