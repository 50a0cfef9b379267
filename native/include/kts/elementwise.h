// Row operations around the big products: gated activation, LoRA's thin products, dropout masks, casts. One table per
// ISA.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kts/base.h"
#include "kts/isa.h"
#include "kts/types.h"

namespace kts {

// How gate and up become h. All but the last are act(gate) * up.
enum class Activation : int { kSilu, kGelu, kGeluTanh, kRelu, kClampedSwiglu };
inline constexpr int kNumActivations = 5;

// In the order of Activation; "gelu" is by erf.
inline constexpr const char* kActivationNames[kNumActivations] = {"silu", "gelu", "gelu_tanh", "relu",
                                                                  "clamped_swiglu"};

// Of kClampedSwiglu: (up + 1) gate sigmoid(alpha gate), gate at most limit, up within -limit .. limit.
// limit is an f16 number.
struct GateParams {
  float alpha = 1.702f;
  float limit = 7.0f;
};

// Dropout decisions of one row; element (row, col) is kept iff its hash is >= threshold. See moe/dropout.h.
struct RowMask {
  uint32_t key0 = 0;
  uint32_t key1 = 0;
  int32_t threshold = 0;  // of 2^24
};

struct GluOps {
  // g, u: f32 sums [cols] -> h, rounded once to bf16; g and u for backward in f16 (g_out, u_out, may both be null).
  void (*forward)(const GateParams& params, const float* g, const float* u, int64_t cols, f16_t* g_out, f16_t* u_out,
                  bf16_t* h_out);
  // dh: gradient of h before the routing weight, f32 [cols]. Writes h, dg, du (bf16, of weight * dh); returns sum(dh * h)
  // of the unrounded h.
  float (*backward)(const GateParams& params, const f16_t* g, const f16_t* u, const float* dh, float weight,
                    int64_t cols, bf16_t* dg, bf16_t* du, bf16_t* h);
};

struct RowOps {
  Isa isa;
  GluOps glu[kNumActivations];
  // dst += scale * src
  void (*scale_add)(float scale, const float* src, int64_t cols, float* dst);
  // dst = bf16(src)
  void (*to_bf16)(const float* src, int64_t cols, bf16_t* dst);
  // LoRA factors are f32, the rows that meet them bf16.
  // c[i, j] (+)= sum_k a_i[k] * b[j * b_stride + k], i < m, j < n: both operands are read along k.
  void (*dot_rows)(const bf16_t* const* a_rows, int64_t m, const float* b, int64_t b_stride, int64_t n, int64_t k,
                   float* c, int64_t ldc, bool accumulate);
  // c[i, :] (+)= sum_t l[i * l_row + t * l_term] * q_t[:], i < rows, t < terms in ascending order; q_t = q_rows[t] +
  // q_offset.
  void (*axpy_factor)(const float* l, int64_t l_row, int64_t l_term, int64_t rows, const float* const* q_rows,
                      int64_t q_offset, int64_t terms, float* c, int64_t ldc, int64_t cols, bool accumulate);
  void (*axpy_rows)(const float* l, int64_t l_row, int64_t l_term, int64_t rows, const bf16_t* const* q_rows,
                    int64_t q_offset, int64_t terms, float* c, int64_t ldc, int64_t cols, bool accumulate);
  // to[j * to_stride + i] = from[i * from_stride + j], i < rows, j < cols
  void (*transpose)(const float* from, int64_t from_stride, int64_t rows, int64_t cols, float* to, int64_t to_stride);
  // x [cols] -> q = round(x / scale), to nearest even, scale = max |x| / 127 and at least 2^-126, returned; zeros up to a
  // multiple of 64.
  // The scale is NaN when x holds a NaN or infinity, 0 when x is all zeros.
  float (*quantize_row)(const bf16_t* x, int64_t cols, int8_t* q);
  // dst[j] = kept(col_begin + j) ? src[j] : 0
  void (*mask_bf16)(RowMask mask, int64_t col_begin, const bf16_t* src, int64_t cols, bf16_t* dst);
  // dst[j] += kept(col_begin + j) ? src[j] : 0
  void (*masked_add)(RowMask mask, int64_t col_begin, const float* src, int64_t cols, float* dst);
};

namespace scalar {
extern const RowOps kRowOps;
}
namespace avx2 {
extern const RowOps kRowOps;
}
namespace avx512 {
extern const RowOps kRowOps;
}

}  // namespace kts
