// One task of one of the two products made from packed weights (kts/packed.h): what every kernel of the table takes.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kts/base.h"
#include "kts/packed.h"
#include "kts/types.h"

namespace kts {

// The longest rows whose int8 products int32 sums hold exactly in every kernel.
inline constexpr int64_t kMaxInt8RowLength = 32768;

enum class Direction : int { kForward = 0, kInputGrad = 1 };

// What the rows of `a` are when a product with int8 or int4 weights is computed.
enum class Rows : int {
  kBf16 = 0,   // weight-only: sums in f32
  kInt8 = 1,   // quantised by row (RowOps::quantize_row): exact int32 sums, then scales; forward only
  kBfp16 = 2,  // as kBf16, but few rows may be taken in block floating point (arch/gemv_bfp_inl.h); forward only
};

// One task of a product, for a range of column panels.
//   kForward:    c[m, cols] (+)= a[m, k] W^T  columns are n, the sum runs over k
//   kInputGrad:  c[m, cols] (+)= a[m, n] W    columns are k, the sum runs over n
// c: f32, cols = 32 * (panel_end - panel_begin) columns, row stride ldc >= cols; columns beyond the matrix get zeros.
// Where the scale of an int8 weight goes: forward multiplies the finished sum; the input gradient multiplies the element
// of `a`, which kernels whose operands are bf16 (AVX512-BF16, AMX) then round to bf16.
// Every row of c depends on its own row of `a` only. The vector and scalar kernels of bf16 rows sum in ascending order
// in f32 with fused multiply-adds, so their results do not depend on m and on how the work is split.
struct GemmTask {
  const bf16_t* const* a_rows = nullptr;  // one pointer per row, of which exactly k (n) elements are read
  int64_t m = 0;
  const PackedMatrix* w = nullptr;
  int64_t panel_begin = 0;
  int64_t panel_end = 0;
  float* c = nullptr;
  int64_t ldc = 0;
  bool accumulate = false;  // kInputGrad, or kForward of bf16 weights
  void* scratch = nullptr;  // kGemmScratchBytes, 64-byte aligned, one per thread
  int64_t a_offset = 0;     // the rows begin at a_rows[i] + a_offset, q_rows[i] + a_offset

  // int8 rows instead of a_rows: zeros up to a multiple of 64 elements; value = q * q_scales[i]
  const int8_t* const* q_rows = nullptr;
  const float* q_scales = nullptr;
  bool block_floating_point = false;  // Rows::kBfp16

  Rows rows() const { return q_rows != nullptr ? Rows::kInt8 : block_floating_point ? Rows::kBfp16 : Rows::kBf16; }
};

// The widest column range that one task may have, in panels, and the scratch of a task: it fits the second-level cache.
inline constexpr int64_t kMaxTaskPanels = 4;
inline constexpr int64_t kGemmScratchBytes = 512 << 10;

using GemmFn = void (*)(const GemmTask&);

// What a kernel takes. max_rows: of one task; 0: any number.
struct KernelContract {
  Format weights;
  Rows rows;
  Direction direction;
  int64_t max_rows = 0;
};

// The contracts that kernels open with, by KTS_DCHECKED (arch/contracts.cc): of a task, and of pointers to rows.
void check_task(const GemmTask& task, const KernelContract& contract);
void check_weights(const PackedMatrix& w);
void check_row_pointers(const void* const* rows, int64_t count, int64_t alignment);
template <class T>
KTS_INLINE void check_rows(const T* const* rows, int64_t count) {
  check_row_pointers(reinterpret_cast<const void* const*>(rows), count, alignof(T));
}

}  // namespace kts
