// bf16 rows, int4 weights on AVX-512: 12 rows x 32 columns = 24 sums + 2 vectors of dwords + 2 weights of 32 registers; a is
// broadcast from memory by the multiply-add itself.
// Weights are q * scale, exactly.
// 16 dwords of one n would span two tiles with scales of their own, so for few rows of the input gradient the AVX2 row is
// the one to take: memory decides there.
// Code in gemm_float_inl.h and dgrad_float_inl.h.
#include "../dgrad_float_inl.h"
#include "../gemv_bfp_inl.h"
#include "../vec_avx512.h"

namespace kts::avx512 {

using Weights = Int4Weights<Vec>;

void gemm_bf16_s4_f32_12x32_avx512(const GemmTask& task) { gemm_float_forward<Vec, Weights, 12>(task); }
void gemv_bf16_s4_f32_4x32_avx512(const GemmTask& task) { gemv_float_forward<Vec, Weights>(task); }
void gemv_bfp16_s4_f32_4x32_avx512(const GemmTask& task) { gemv_bfp_forward<Vec, Weights>(task); }
void dgrad_bf16_s4_f32_12x32_avx512(const GemmTask& task) { dgrad_widened<Vec, Weights, 12>(task); }

}  // namespace kts::avx512
