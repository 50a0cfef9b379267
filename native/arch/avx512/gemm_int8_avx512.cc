// bf16 rows, int8 weights on AVX-512: 12 rows x 32 columns = 24 sums + 2 vectors of dwords + 2 weights of 32 registers; a is
// broadcast from memory by the multiply-add itself.
// Sums of q, times the scale of the column at the end; in the input gradient a is multiplied by it and rounded to bf16.
// Code in gemm_float_inl.h, dgrad_float_inl.h, dgemv_float_inl.h.
#include "../dgemv_float_inl.h"
#include "../gemv_bfp_inl.h"
#include "../vec_avx512.h"

namespace kts::avx512 {

using Weights = Int8Weights<Vec>;

void gemm_bf16_s8_f32_12x32_avx512(const GemmTask& task) { gemm_float_forward<Vec, Weights, 12>(task); }
void gemv_bf16_s8_f32_4x32_avx512(const GemmTask& task) { gemv_float_forward<Vec, Weights>(task); }
void gemv_bfp16_s8_f32_4x32_avx512(const GemmTask& task) { gemv_bfp_forward<Vec, Weights>(task); }
void dgrad_bf16_s8_f32_12x32_avx512(const GemmTask& task) { dgrad_float<Vec, Weights, 12, 48>(task); }
void dgemv_bf16_s8_f32_4x32_avx512(const GemmTask& task) { dgemv_float<Vec, Weights, 12>(task); }

}  // namespace kts::avx512
