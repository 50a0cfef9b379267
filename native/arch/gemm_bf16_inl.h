// bf16 x packed bf16 -> f32 on CPUs without bf16 instructions, written once on Vec (W = 8 or 16). Include only from gemm_bf16_<isa>.cc.
//
// Operands a are widened to f32 in blocks of kBlockM rows x kReduceBlock (rows kAStride floats apart, so that every row is at a
// constant displacement from one pointer). The micro-kernel holds rows x 2 vectors of sums in registers.
//   forward:     a dword of a tile is the pair (k even, k odd) of one n. Shift and mask give two vectors of W n each, so weights go
//                from the packed bytes straight into the multiply-adds.
//   input grad:  tiles are transposed as dwords into an L2 scratch [n][even k | odd k] in f32, once per task, used for all its rows.
//                The sums come out with even and odd columns apart and are interleaved when they are added to c.
#pragma once
#include "kts/gemm.h"

namespace kts {

template <class V>
KTS_INLINE void widen_rows(const bf16_t* const* a_rows, int64_t rows, int64_t begin, int64_t count, float* a) {
  const int64_t padded = align_up(count, kTileK);
  for (int64_t i = 0; i < rows; ++i) {
    const bf16_t* from = a_rows[i] + begin;
    float* to = a + i * kAStride;
    int64_t t = 0;
    for (; t + V::W <= count; t += V::W) V::store(to + t, V::load_bf16(from + t));
    if (t < count) {
      V::store(to + t, V::load_bf16_n(from + t, count - t));
      t += V::W;
    }
    for (; t < padded; t += V::W) V::store(to + t, V::zero());
  }
}

// A tile of 16 n is 16 / W vectors wide; a micro-kernel column step covers two vectors of a panel of 32.
template <class V>
struct Step {
  static constexpr int kCols = 2 * V::W;              // 32 or 16
  static constexpr int kPerPanel = kPanel / kCols;    // 1 or 2
  // bf16 elements from the panel's k tile to vector v of step s
  KTS_INLINE constexpr int64_t forward_offset(int s, int v) {
    return V::W == 16 ? v * kTileElements : s * kTileElements + v * 2 * V::W;
  }
};

template <class V, int MR>
void micro_forward(const float* a, const bf16_t* tiles, int step, int64_t k_tiles, float* c, int64_t ldc, bool accumulate) {
  using F = typename V::F;
  F sum0[MR], sum1[MR];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
    sum0[i] = accumulate ? V::load(c + i * ldc) : V::zero();
    sum1[i] = accumulate ? V::load(c + i * ldc + V::W) : V::zero();
  }
  const bf16_t* left = tiles + Step<V>::forward_offset(step, 0);
  const bf16_t* right = tiles + Step<V>::forward_offset(step, 1);
  for (int64_t kt = 0; kt < k_tiles; ++kt) {
    for (int pair = 0; pair < kTileK / 2; ++pair) {
      const auto left_pairs = V::load_pairs(left);
      const auto right_pairs = V::load_pairs(right);
      left += 2 * kTileN;
      right += 2 * kTileN;
      {
        const F w0 = V::even(left_pairs), w1 = V::even(right_pairs);
#pragma GCC unroll 16
        for (int i = 0; i < MR; ++i) {
          const F x = V::set1(a[i * kAStride]);
          sum0[i] = V::fma(x, w0, sum0[i]);
          sum1[i] = V::fma(x, w1, sum1[i]);
        }
      }
      {
        const F w0 = V::odd(left_pairs), w1 = V::odd(right_pairs);
#pragma GCC unroll 16
        for (int i = 0; i < MR; ++i) {
          const F x = V::set1(a[i * kAStride + 1]);
          sum0[i] = V::fma(x, w0, sum0[i]);
          sum1[i] = V::fma(x, w1, sum1[i]);
        }
      }
      a += 2;
    }
    left += kTileElements;  // the panel's other tile
    right += kTileElements;
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
    V::store(c + i * ldc, sum0[i]);
    V::store(c + i * ldc + V::W, sum1[i]);
  }
}

// w: f32 [count][2 W] with row stride kPanel: even columns, then odd columns.
template <class V, int MR>
void micro_input_grad(const float* a, const float* w, int64_t count, float* c, int64_t ldc, bool accumulate) {
  using F = typename V::F;
  F even[MR], odd[MR];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) even[i] = odd[i] = V::zero();
  for (int64_t t = 0; t < count; ++t) {
    const F w0 = V::load(w), w1 = V::load(w + V::W);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const F x = V::set1(a[i * kAStride]);
      even[i] = V::fma(x, w0, even[i]);
      odd[i] = V::fma(x, w1, odd[i]);
    }
    w += kPanel;
    ++a;
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
    F low, high;
    V::interleave(even[i], odd[i], &low, &high);
    if (accumulate) {
      low = V::add(V::load(c + i * ldc), low);
      high = V::add(V::load(c + i * ldc + V::W), high);
    }
    V::store(c + i * ldc, low);
    V::store(c + i * ldc + V::W, high);
  }
}

// Calls fn<rows>() with rows, 1 <= rows <= MR, as a compile-time constant.
template <int MR, class Fn>
KTS_INLINE void with_rows(int64_t rows, Fn&& fn) {
  if constexpr (MR == 1) {
    fn.template operator()<1>();
  } else {
    if (rows == MR) {
      fn.template operator()<MR>();
    } else {
      with_rows<MR - 1>(rows, fn);
    }
  }
}

template <class V, int MR>
void gemm_bf16_forward(const GemmTask& task) {
  const int64_t k_tiles = task.w->k_panels();
  const bf16_t* packed = static_cast<const bf16_t*>(task.w->data);
  float* a = task.scratch;
  for (int64_t k0 = 0; k0 < task.w->k; k0 += kReduceBlock) {
    const int64_t count = min_i64(kReduceBlock, task.w->k - k0);
    const bool accumulate = task.accumulate || k0 > 0;
    for (int64_t i = 0; i < task.m; i += MR) {
      const int64_t rows = min_i64(MR, task.m - i);
      widen_rows<V>(task.a_rows + i, rows, k0, count, a);
      for (int64_t p = task.panel_begin; p < task.panel_end; ++p) {
        const bf16_t* tiles = packed + (p * k_tiles + k0 / kTileK) * 2 * kTileElements;
        float* c = task.c + i * task.ldc + (p - task.panel_begin) * kPanel;
        for (int s = 0; s < Step<V>::kPerPanel; ++s)
          with_rows<MR>(rows, [&]<int R>() {
            micro_forward<V, R>(a, tiles, s, ceil_div(count, kTileK), c + s * Step<V>::kCols, task.ldc, accumulate);
          });
      }
    }
  }
}

// Tile (n block, k panel) -> w[n][s * 2 W + ...] for its 16 n.
template <class V>
KTS_INLINE void transpose_tile(const bf16_t* tile, float* w) {
  for (int s = 0; s < Step<V>::kPerPanel; ++s)
    for (int n0 = 0; n0 < kTileN; n0 += V::W) {
      typename V::I rows[V::W];
      for (int i = 0; i < V::W; ++i) rows[i] = V::load_pairs(tile + (s * V::W + i) * 2 * kTileN + n0 * 2);
      V::transpose(rows);
      for (int i = 0; i < V::W; ++i) {
        float* to = w + (n0 + i) * kPanel + s * Step<V>::kCols;
        V::store(to, V::even(rows[i]));
        V::store(to + V::W, V::odd(rows[i]));
      }
    }
}

template <class V, int MR>
void gemm_bf16_input_grad(const GemmTask& task) {
  const int64_t k_tiles = task.w->k_panels();
  const bf16_t* packed = static_cast<const bf16_t*>(task.w->data);
  float* a = task.scratch;
  float* w = task.scratch + kMaxBlockM * kAStride;
  for (int64_t n0 = 0; n0 < task.w->n; n0 += kReduceBlock) {
    const int64_t count = min_i64(kReduceBlock, task.w->n - n0);
    const bool accumulate = task.accumulate || n0 > 0;
    for (int64_t n = 0; n < count; n += kTileN) {
      const int64_t panel = (n0 + n) / kPanel, half = (n0 + n) % kPanel / kTileN;
      for (int64_t p = task.panel_begin; p < task.panel_end; ++p)
        transpose_tile<V>(packed + ((panel * k_tiles + p) * 2 + half) * kTileElements,
                          w + ((p - task.panel_begin) * kReduceBlock + n) * kPanel);
    }
    for (int64_t i = 0; i < task.m; i += MR) {
      const int64_t rows = min_i64(MR, task.m - i);
      widen_rows<V>(task.a_rows + i, rows, n0, count, a);
      for (int64_t p = task.panel_begin; p < task.panel_end; ++p)
        for (int s = 0; s < Step<V>::kPerPanel; ++s) {
          const float* from = w + (p - task.panel_begin) * kReduceBlock * kPanel + s * Step<V>::kCols;
          float* c = task.c + i * task.ldc + (p - task.panel_begin) * kPanel + s * Step<V>::kCols;
          with_rows<MR>(rows, [&]<int R>() { micro_input_grad<V, R>(a, from, count, c, task.ldc, accumulate); });
        }
    }
  }
}

}  // namespace kts
