// The reference of every row of the table: readable loops over the packed layout (formula in kts/gemm.h), sums in f32
// in ascending order with fused multiply-adds. For tests: two orders of magnitude slower than the vector rows.
#include "kts/gemm.h"

namespace kts::scalar {

namespace {
float element(const PackedMatrix& w, int64_t n, int64_t k) {
  const int64_t tile = (n / 32 * w.k_panels() + k / 32) * 2 + n % 32 / 16;
  const int64_t inside = (k % 32 / 2) * 32 + n % 16 * 2 + k % 2;
  return bf16_to_f32(static_cast<const bf16_t*>(w.data)[tile * kTileElements + inside]);
}
}  // namespace

void gemm_bf16_bf16_f32_1x1_scalar(const GemmTask& task) {
  const int64_t cols = (task.panel_end - task.panel_begin) * kPanel;
  for (int64_t i = 0; i < task.m; ++i)
    for (int64_t j = 0; j < cols; ++j) {
      const int64_t n = task.panel_begin * kPanel + j;
      float sum = task.accumulate ? task.c[i * task.ldc + j] : 0.0f;
      if (n < task.w->n)
        for (int64_t k = 0; k < task.w->k; ++k)
          sum = __builtin_fmaf(bf16_to_f32(task.a_rows[i][k]), element(*task.w, n, k), sum);
      task.c[i * task.ldc + j] = sum;
    }
}

void dgrad_bf16_bf16_f32_1x1_scalar(const GemmTask& task) {
  const int64_t cols = (task.panel_end - task.panel_begin) * kPanel;
  for (int64_t i = 0; i < task.m; ++i)
    for (int64_t j = 0; j < cols; ++j) {
      const int64_t k = task.panel_begin * kPanel + j;
      float sum = task.accumulate ? task.c[i * task.ldc + j] : 0.0f;
      if (k < task.w->k)
        for (int64_t n = 0; n < task.w->n; ++n)
          sum = __builtin_fmaf(bf16_to_f32(task.a_rows[i][n]), element(*task.w, n, k), sum);
      task.c[i * task.ldc + j] = sum;
    }
}

}  // namespace kts::scalar
