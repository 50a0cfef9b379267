// bf16 rows, int8 weights on AVX2 + FMA: 6 rows x 16 columns = 12 sums + 2 weights + 1 broadcast = 15 of 16 registers.
// Sums of q, times the scale of the column at the end; in the input gradient a is multiplied by it and rounded to bf16.
// Code in gemm_float_inl.h, dgrad_float_inl.h, dgemv_float_inl.h.
#include "../dgemv_float_inl.h"
#include "../gemv_bfp_inl.h"
#include "../vec_avx2.h"

namespace kts::avx2 {

using Weights = Int8Weights<Vec>;

void gemm_bf16_s8_f32_6x16_avx2(const GemmTask& task) { gemm_float_forward<Vec, Weights, 6>(task); }
void gemv_bf16_s8_f32_4x16_avx2(const GemmTask& task) { gemv_float_forward<Vec, Weights>(task); }
void gemv_bfp16_s8_f32_4x16_avx2(const GemmTask& task) { gemv_bfp_forward<Vec, Weights>(task); }
void dgrad_bf16_s8_f32_6x16_avx2(const GemmTask& task) { dgrad_float<Vec, Weights, 6, 32>(task); }
void dgemv_bf16_s8_f32_4x16_avx2(const GemmTask& task) { dgemv_float<Vec, Weights, 6>(task); }

}  // namespace kts::avx2
