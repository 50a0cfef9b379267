// bf16 rows, bf16 weights on AVX-512: 12 rows x 32 columns = 24 sums + 2 vectors of dwords + 2 weights of 32 registers; a is
// broadcast from memory by the multiply-add itself.
// Code in gemm_float_inl.h, dgrad_float_inl.h, dgemv_float_inl.h.
#include "../dgemv_float_inl.h"
#include "../vec_avx512.h"

namespace kts::avx512 {

using Weights = Bf16Weights<Vec>;

void gemm_bf16_bf16_f32_12x32_avx512(const GemmTask& task) { gemm_float_forward<Vec, Weights, 12>(task); }
void gemv_bf16_bf16_f32_4x32_avx512(const GemmTask& task) { gemv_float_forward<Vec, Weights>(task); }
void dgrad_bf16_bf16_f32_12x32_avx512(const GemmTask& task) { dgrad_float<Vec, Weights, 12, 48>(task); }
void dgemv_bf16_bf16_f32_4x32_avx512(const GemmTask& task) { dgemv_float<Vec, Weights, 12>(task); }

}  // namespace kts::avx512
