// The reference of every row of the table: readable loops over the packed layout (formulas in kts/packed.h). bf16 rows:
// sums in f32 in ascending order with fused multiply-adds. int8 rows: exact int32 sums, per group for int4, whose
// products with the scales are summed in f32 in ascending order. For tests: two orders of magnitude slower than the
// vector rows.
#include "kts/kernel.h"

namespace kts::scalar {

namespace {

void forward(const GemmTask& task, [[maybe_unused]] Format weights) {
  KTS_DCHECKED(check_task(task, {weights, Rows::kBf16, Direction::kForward}));
  const PackedMatrix& w = *task.w;
  const int64_t cols = (task.panel_end - task.panel_begin) * kPanel;
  for (int64_t i = 0; i < task.m; ++i)
    for (int64_t j = 0; j < cols; ++j) {
      const int64_t n = task.panel_begin * kPanel + j;
      float sum = task.accumulate ? task.c[i * task.ldc + j] : 0.0f;
      if (n < w.n)
        for (int64_t k = 0; k < w.k; ++k)
          sum = __builtin_fmaf(bf16_to_f32(task.a_rows[i][task.a_offset + k]), packed_unscaled(w, n, k), sum);
      if (w.format.kind == Format::kInt8) sum *= w.int8_scales()[n];
      task.c[i * task.ldc + j] = sum;
    }
}

void input_grad(const GemmTask& task, [[maybe_unused]] Format weights) {
  KTS_DCHECKED(check_task(task, {weights, Rows::kBf16, Direction::kInputGrad}));
  const PackedMatrix& w = *task.w;
  const int64_t cols = (task.panel_end - task.panel_begin) * kPanel;
  for (int64_t i = 0; i < task.m; ++i)
    for (int64_t j = 0; j < cols; ++j) {
      const int64_t k = task.panel_begin * kPanel + j;
      float sum = task.accumulate ? task.c[i * task.ldc + j] : 0.0f;
      if (k < w.k)
        for (int64_t n = 0; n < w.n; ++n) {
          float a = bf16_to_f32(task.a_rows[i][task.a_offset + n]);
          if (w.format.kind == Format::kInt8) a *= w.int8_scales()[n];
          sum = __builtin_fmaf(a, packed_unscaled(w, n, k), sum);
        }
      task.c[i * task.ldc + j] = sum;
    }
}

void forward_int8_rows(const GemmTask& task, [[maybe_unused]] Format weights) {
  KTS_DCHECKED(check_task(task, {weights, Rows::kInt8, Direction::kForward}));
  const PackedMatrix& w = *task.w;
  const int64_t cols = (task.panel_end - task.panel_begin) * kPanel;
  const int64_t group = w.format.kind == Format::kInt4 ? w.format.group : w.k;
  for (int64_t i = 0; i < task.m; ++i)
    for (int64_t j = 0; j < cols; ++j) {
      const int64_t n = task.panel_begin * kPanel + j;
      float value = 0.0f;
      for (int64_t begin = 0; n < w.n && begin < w.k; begin += group) {
        int32_t sum = 0;
        for (int64_t k = begin; k < min_i64(begin + group, w.k); ++k)
          sum += task.q_rows[i][task.a_offset + k] * packed_integer(w, n, k);
        value = __builtin_fmaf(static_cast<float>(sum), packed_scale(w, n, begin), value);
      }
      task.c[i * task.ldc + j] = value * task.q_scales[i];
    }
}

}  // namespace

void gemm_bf16_bf16_f32_1x1_scalar(const GemmTask& task) { forward(task, Format::kBf16); }
void gemm_bf16_s8_f32_1x1_scalar(const GemmTask& task) { forward(task, Format::kInt8); }
void gemm_bf16_s4_f32_1x1_scalar(const GemmTask& task) { forward(task, Format::kInt4); }
void dgrad_bf16_bf16_f32_1x1_scalar(const GemmTask& task) { input_grad(task, Format::kBf16); }
void dgrad_bf16_s8_f32_1x1_scalar(const GemmTask& task) { input_grad(task, Format::kInt8); }
void dgrad_bf16_s4_f32_1x1_scalar(const GemmTask& task) { input_grad(task, Format::kInt4); }
void gemm_bf16_f16_f32_1x1_scalar(const GemmTask& task) { forward(task, Format::kF16); }
void dgrad_bf16_f16_f32_1x1_scalar(const GemmTask& task) { input_grad(task, Format::kF16); }
void gemm_bf16_b4_f32_1x1_scalar(const GemmTask& task) { forward(task, Format::kBlock4); }
void dgrad_bf16_b4_f32_1x1_scalar(const GemmTask& task) { input_grad(task, Format::kBlock4); }
void gemm_bf16_b5_f32_1x1_scalar(const GemmTask& task) { forward(task, Format::kBlock5); }
void dgrad_bf16_b5_f32_1x1_scalar(const GemmTask& task) { input_grad(task, Format::kBlock5); }
void gemm_bf16_b6_f32_1x1_scalar(const GemmTask& task) { forward(task, Format::kBlock6); }
void dgrad_bf16_b6_f32_1x1_scalar(const GemmTask& task) { input_grad(task, Format::kBlock6); }
void gemm_bf16_b8_f32_1x1_scalar(const GemmTask& task) { forward(task, Format::kBlock8); }
void dgrad_bf16_b8_f32_1x1_scalar(const GemmTask& task) { input_grad(task, Format::kBlock8); }
void gemm_s8_s8_f32_1x1_scalar(const GemmTask& task) { forward_int8_rows(task, Format::kInt8); }
void gemm_s8_s4_f32_1x1_scalar(const GemmTask& task) { forward_int8_rows(task, Format::kInt4); }

}  // namespace kts::scalar
