// c (+)= a W with bf16 rows, the input gradient, from the same packed copy as the forward product: the twin of
// gemm_float_inl.h, with columns k and sums over n. Tiles are transposed as they are widened, and then the forward's
// micro-kernel runs.
#pragma once
#include "gemm_float_inl.h"

namespace kts {

// W consecutive n from tile column v, one block of 32 k -> w[step][n][2 W].
template <class V, class Weights>
KTS_INLINE void transpose_block(const typename Weights::Block& block, int v, float* w) {
  constexpr int64_t kCols = Step<V>::kCols;
  auto scale = block.scale(v);
#pragma GCC unroll 4
  for (int k = 0; k < kTileK; k += V::W) {
    if (Weights::kParts > 1 && k == kTileK / Weights::kParts) scale = block.scale(v, 1);
    typename V::I rows[V::W];
#pragma GCC unroll 16
    for (int j = 0; j < V::W; ++j) {
      const auto dwords = block.dwords(v, (k + j) / Weights::kPerDword);
      rows[j] = V::as_i(Weights::weight(dwords, scale, j % Weights::kPerDword));
    }
    V::transpose(rows);
    float* to = w + k / kCols * kReduceBlock * kCols + k % kCols;
    for (int i = 0; i < V::W; ++i) V::store(to + i * kCols, V::as_f(rows[i]));
  }
}

template <class V, class Weights>
[[gnu::noinline]] void transpose_panel(const Weights& weights, int64_t panel, int64_t kb, float* w) {
  const auto block = weights.block(panel, 0, kb);
  for (int v = 0; v < kPanel / V::W; ++v) transpose_block<V, Weights>(block, v, w + v * V::W * Step<V>::kCols);
}

template <class V, class Weights>
KTS_INLINE void widen_grad_rows(const GemmTask& task, int64_t i, int64_t rows, int64_t n0, int64_t count, float* a) {
  if constexpr (Weights::kFormat == Format::kInt8)
    widen_rows<V>(task.a_rows + i, rows, task.a_offset + n0, count, a, task.w->int8_scales() + n0, Weights::kUnit);
  else
    widen_rows<V>(task.a_rows + i, rows, task.a_offset + n0, count, a);
}

// The task's part of the next kReduceBlock, which begins at n.
template <class Weights>
KTS_INLINE RegionAhead next_weights(const Weights& weights, const GemmTask& task, int64_t n, int64_t steps) {
  const int64_t panels = n < task.w->n ? ceil_div(min_i64(kReduceBlock, task.w->n - n), kPanel) : 0;
  return {weights.block(n / kPanel, 0, task.panel_begin).rows, panels,
          (task.panel_end - task.panel_begin) * weights.block_bytes(), weights.panel_bytes(), steps};
}

template <class V, class Weights, int MR>
void dgrad_widened(const GemmTask& task) {
  KTS_DCHECKED(check_task(task, {Weights::kFormat, Rows::kBf16, Direction::kInputGrad}));
  const Weights weights(*task.w);
  const int64_t panels = task.panel_end - task.panel_begin;
  float* a = static_cast<float*>(task.scratch);
  float* w = a + kMaxBlockM * kAStride;
  for (int64_t n0 = 0; n0 < task.w->n; n0 += kReduceBlock) {
    const int64_t count = min_i64(kReduceBlock, task.w->n - n0);
    const bool accumulate = task.accumulate || n0 > 0;
    RegionAhead ahead =
        next_weights(weights, task, n0 + count, ceil_div(task.m, MR) * panels * Step<V>::kPerPanel * count);
    for (int64_t n = 0; n < count; n += kPanel)
      for (int64_t p = 0; p < panels; ++p)
        transpose_panel<V>(weights, (n0 + n) / kPanel, task.panel_begin + p,
                           w + widened_at<V>(p, 0) + n * Step<V>::kCols);
    for (int64_t i = 0, rows; i < task.m; i += rows) {
      rows = block_rows(task.m - i, MR);
      widen_grad_rows<V, Weights>(task, i, rows, n0, count, a);
      for (int64_t p = 0; p < panels; ++p)
        for (int s = 0; s < Step<V>::kPerPanel; ++s) {
          float* c = task.c + i * task.ldc + p * kPanel + s * Step<V>::kCols;
          with_rows<MR>(rows, [&]<int R>() {
            micro_widened<V, R>(a, w + widened_at<V>(p, s), count, c, task.ldc, accumulate, ahead);
          });
        }
    }
  }
}

}  // namespace kts
