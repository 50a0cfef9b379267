// c (+)= a W for few rows: the input gradient without a scratch of f32 weights. Packed dwords are transposed as they
// are, which costs 3 shuffles per vector whatever the format, into one vector of kPerDword * W columns per n; weights
// become f32 in the registers of the micro-kernel, as in the forward product.
//
// Sums are kept by phase: phase f of a unit holds the columns f, f + kPerDword, ... They are brought into this order
// from c, and back, once per task. Sums run in ascending order of n from c on: the same bits as dgrad_float_inl.h.
// int4: the row is multiplied by the scales instead of the weights. Exact, since a scale has 5 significant bits and an
// element of the row 8.
#pragma once
#include "dgrad_float_inl.h"

namespace kts {

// How the columns of a task lie in units: one vector of dwords covers kCols columns, kHalves of them a unit.
template <class V, class Weights>
struct Units {
  static constexpr int64_t kCols = V::W * Weights::kPerDword;
  static constexpr int64_t kWidth = kCols * Weights::kHalves;
  static constexpr int64_t kMost = (kMaxTaskPanels * kPanel + kWidth - kPanel) / kWidth + 1;
  int64_t begin, end;  // units that the task's columns touch

  explicit Units(const GemmTask& task)
      : begin(task.panel_begin * kPanel / kWidth), end(ceil_div(task.panel_end * kPanel, kWidth)) {}
};

constexpr int64_t kDgemvRows = 192;  // rows that share one transposition

// Scratch of a task, after `a`.
template <class V, class Weights>
struct DgemvScratch {
  static constexpr int64_t kColumns = Units<V, Weights>::kMost * Units<V, Weights>::kWidth;
  static constexpr int64_t kVectors = Units<V, Weights>::kMost * Weights::kHalves * kReduceBlock;
  static constexpr int64_t kRowFloats = kMaxBlockM * kAStride;
  static_assert((2 * kRowFloats + kDgemvRows * kColumns + kVectors * V::W) * 4 <= kGemmScratchBytes);

  float* a;               // [rows][kAStride]
  float* scaled;          // the same, int4: times the scales
  float* sums;            // [kDgemvRows][unit][half][phase][W]
  typename V::I* dwords;  // [unit][half][kReduceBlock]

  explicit DgemvScratch(void* memory)
      : a(static_cast<float*>(memory)),
        scaled(a + kRowFloats),
        sums(scaled + kRowFloats),
        dwords(reinterpret_cast<typename V::I*>(sums + kDgemvRows * kColumns)) {}
};

// Phases of kCols columns <-> the columns in order.
template <class V, int kPhases>
KTS_INLINE void split_phases(const float* row, float* phases) {
  typename V::F a[kPhases], b[kPhases];
  for (int i = 0; i < kPhases; ++i) a[i] = V::load(row + i * V::W);
  if constexpr (kPhases == 2) {
    V::deinterleave(a[0], a[1], &b[0], &b[1]);
  } else {
    typename V::F even0, even1, odd0, odd1;
    V::deinterleave(a[0], a[1], &even0, &odd0);
    V::deinterleave(a[2], a[3], &even1, &odd1);
    V::deinterleave(even0, even1, &b[0], &b[2]);
    V::deinterleave(odd0, odd1, &b[1], &b[3]);
  }
  for (int i = 0; i < kPhases; ++i) V::store(phases + i * V::W, b[i]);
}

template <class V, int kPhases>
KTS_INLINE void join_phases(const float* phases, float* row) {
  typename V::F a[kPhases], b[kPhases];
  for (int i = 0; i < kPhases; ++i) b[i] = V::load(phases + i * V::W);
  if constexpr (kPhases == 2) {
    V::interleave(b[0], b[1], &a[0], &a[1]);
  } else {
    typename V::F even0, even1, odd0, odd1;
    V::interleave(b[0], b[2], &even0, &even1);
    V::interleave(b[1], b[3], &odd0, &odd1);
    V::interleave(even0, odd0, &a[0], &a[1]);
    V::interleave(even1, odd1, &a[2], &a[3]);
  }
  for (int i = 0; i < kPhases; ++i) V::store(row + i * V::W, a[i]);
}

// Calls fn(row, phases) for each vector of columns of each row of c, where row is in c, or a copy of what of it belongs
// to the task if that is not all (AVX-512 and int4 units are wider than a panel); kStore: copied back.
template <class V, class Weights, bool kStore, class Fn>
KTS_INLINE void for_sums(const GemmTask& task, int64_t i0, int64_t rows, float* sums, Fn&& fn) {
  using U = Units<V, Weights>;
  const U units(task);
  const int64_t begin = task.panel_begin * kPanel, end = task.panel_end * kPanel, first = units.begin * U::kWidth;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t col = first; col < units.end * U::kWidth; col += U::kCols) {
      float* c = task.c + (i0 + i) * task.ldc + col - begin;
      float* phases = sums + i * DgemvScratch<V, Weights>::kColumns + col - first;
      if (col >= begin && col + U::kCols <= end) {
        fn(c, phases);
        continue;
      }
      float part[U::kCols] = {};
      const int64_t from = col < begin ? begin - col : 0, to = min_i64(U::kCols, end - col);
      for (int64_t j = from; !kStore && j < to; ++j) part[j] = c[j];
      fn(part, phases);
      for (int64_t j = from; kStore && j < to; ++j) c[j] = part[j];
    }
}

template <class V, class Weights>
KTS_INLINE void load_sums(const GemmTask& task, int64_t i0, int64_t rows, float* sums) {
  if (!task.accumulate) {
    for (int64_t j = 0; j < rows * DgemvScratch<V, Weights>::kColumns; j += V::W) V::store(sums + j, V::zero());
    return;
  }
  for_sums<V, Weights, false>(task, i0, rows, sums,
                              [](float* row, float* phases) { split_phases<V, Weights::kPerDword>(row, phases); });
}

template <class V, class Weights>
KTS_INLINE void store_sums(const GemmTask& task, int64_t i0, int64_t rows, float* sums) {
  for_sums<V, Weights, true>(task, i0, rows, sums,
                             [](float* row, float* phases) { join_phases<V, Weights::kPerDword>(phases, row); });
}

// MR rows x NP phases from phase kFirst of one vector of dwords per n.
template <class V, class Weights, int MR, int NP, int kFirst, class Ahead>
[[gnu::noinline]] void micro_transposed(const float* a, const typename V::I* dwords, int64_t count, float* sums,
                                        Ahead& shared_ahead) {
  using F = typename V::F;
  Ahead ahead = shared_ahead;  // in registers
  constexpr int64_t kStride = DgemvScratch<V, Weights>::kColumns;
  F sum[MR][NP];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int f = 0; f < NP; ++f) sum[i][f] = V::load(sums + i * kStride + (kFirst + f) * V::W);
  for (int64_t n = 0; n < count; ++n) {
    ahead.step();
    F w[NP];
#pragma GCC unroll 4
    for (int f = 0; f < NP; ++f) w[f] = Weights::weight(dwords[n], NoScale(), kFirst + f);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const F x = V::set1(a[i * kAStride + n]);
#pragma GCC unroll 4
      for (int f = 0; f < NP; ++f) sum[i][f] = V::fma(x, w[f], sum[i][f]);
    }
  }
  shared_ahead = ahead;
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int f = 0; f < NP; ++f) V::store(sums + i * kStride + (kFirst + f) * V::W, sum[i][f]);
}

// `rows` rows times the transposed dwords of one vector of columns per n.
template <class V, class Weights, int MR, class Ahead>
KTS_INLINE void add_columns(const float* a, int64_t rows, const typename V::I* dwords, int64_t count, float* sums,
                            Ahead& ahead) {
  with_rows<MR>(rows, [&]<int R>() {
    constexpr int kAll = Weights::kPerDword;
    if constexpr (kAll == 2 || 3 * R <= MR) {
      micro_transposed<V, Weights, R, kAll, 0>(a, dwords, count, sums, ahead);
    } else {
      micro_transposed<V, Weights, R, 2, 0>(a, dwords, count, sums, ahead);
      micro_transposed<V, Weights, R, 2, 2>(a, dwords, count, sums, ahead);
    }
  });
}

// int4: rows of a times the scales of block kb of 32 k.
template <class V, class Weights>
KTS_INLINE void scale_rows(const Weights& weights, int64_t rows, int64_t n0, int64_t count, int64_t kb, const float* a,
                           float* scaled) {
  const typename Weights::Half half(kb);
  const int64_t in_range = min_i64(kb, weights.blocks() - 1);  // a unit may end beyond the matrix
  for (int64_t n = 0; n < count; n += V::W) {
    const bf16_t* at = weights.scales((n0 + n) / kPanel, in_range) + n % kPanel;
    const typename V::F scale = V::mul(V::load_bf16(at), V::set1(half.unit));
    for (int64_t i = 0; i < rows; ++i)
      V::store(scaled + i * kAStride + n, V::mul(V::load(a + i * kAStride + n), scale));
  }
}

// Transposes count n from n0 on, of one unit, to dwords[half][kReduceBlock].
template <class V, class Weights>
KTS_INLINE void transpose_unit(const Weights& weights, int64_t n0, int64_t count, int64_t unit, int64_t ahead,
                               typename V::I* dwords) {
  for (int64_t n = 0; n < count; n += kPanel)
    for (int v = 0; v < kPanel / V::W; ++v)
      weights.transpose((n0 + n) / kPanel, unit * V::W, v, ahead, dwords + n + v * V::W, kReduceBlock);
}

// One unit: sums of `rows` rows += a[rows][count] times the transposed dwords.
template <class V, class Weights, int MR, class Ahead>
KTS_INLINE void add_unit(const Weights& weights, const DgemvScratch<V, Weights>& scratch, const float* a, int64_t rows,
                         int64_t n0, int64_t count, int64_t unit, const typename V::I* dwords, float* sums,
                         Ahead& ahead) {
  for (int half = 0; half < Weights::kHalves; ++half) {
    const float* x = a;
    if constexpr (Weights::kFormat == Format::kInt4) {
      scale_rows<V>(weights, rows, n0, count, unit * 2 + half, a, scratch.scaled);
      x = scratch.scaled;
    }
    add_columns<V, Weights, MR>(x, rows, dwords + half * kReduceBlock, count, sums + half * Units<V, Weights>::kCols,
                                ahead);
  }
}

// One block of rows: the dwords of 32 n of a unit are used at once, out of the first-level cache, and memory is asked
// for the task's part of the next panel.
template <class V, class Weights, int MR>
void dgemv_one_block(const GemmTask& task) {
  const Weights weights(*task.w);
  const Units<V, Weights> units(task);
  const DgemvScratch<V, Weights> scratch(task.scratch);
  const int64_t ahead = ceil_div(kMaxTaskPanels, task.panel_end - task.panel_begin) * Weights::kHalves;
  NoAhead nothing;
  load_sums<V, Weights>(task, 0, task.m, scratch.sums);
  for (int64_t n0 = 0; n0 < task.w->n; n0 += kReduceBlock) {
    const int64_t block = min_i64(kReduceBlock, task.w->n - n0);
    widen_grad_rows<V, Weights>(task, 0, task.m, n0, block, scratch.a);
    for (int64_t n = 0; n < block; n += kPanel)
      for (int64_t u = units.begin; u < units.end; ++u) {
        transpose_unit<V>(weights, n0 + n, kPanel, u, ahead, scratch.dwords);
        add_unit<V, Weights, MR>(weights, scratch, scratch.a + n, task.m, n0 + n, min_i64(kPanel, block - n), u,
                                 scratch.dwords, scratch.sums + (u - units.begin) * Units<V, Weights>::kWidth, nothing);
      }
  }
  store_sums<V, Weights>(task, 0, task.m, scratch.sums);
}

// Rows i0 ... i0 + m of the task, at most kDgemvRows, in blocks of MR that share the dwords of kReduceBlock n.
template <class V, class Weights, int MR>
void dgemv_blocks(const GemmTask& task, int64_t i0, int64_t m) {
  KTS_DCHECK(m >= 1 && m <= kDgemvRows);
  const Weights weights(*task.w);
  const Units<V, Weights> units(task);
  const DgemvScratch<V, Weights> scratch(task.scratch);
  load_sums<V, Weights>(task, i0, m, scratch.sums);
  for (int64_t n0 = 0; n0 < task.w->n; n0 += kReduceBlock) {
    const int64_t count = min_i64(kReduceBlock, task.w->n - n0);
    const auto dwords = [&](int64_t u) { return scratch.dwords + (u - units.begin) * Weights::kHalves * kReduceBlock; };
    RegionAhead ahead =
        next_weights(weights, task, n0 + count, ceil_div(m, MR) * (units.end - units.begin) * Weights::kHalves * count);
    for (int64_t u = units.begin; u < units.end; ++u) transpose_unit<V>(weights, n0, count, u, 0, dwords(u));
    for (int64_t i = 0, rows; i < m; i += rows) {
      rows = block_rows(m - i, MR);
      widen_grad_rows<V, Weights>(task, i0 + i, rows, n0, count, scratch.a);
      for (int64_t u = units.begin; u < units.end; ++u) {
        add_unit<V, Weights, MR>(weights, scratch, scratch.a, rows, n0, count, u, dwords(u),
                                 scratch.sums + i * scratch.kColumns + (u - units.begin) * Units<V, Weights>::kWidth,
                                 ahead);
      }
    }
  }
  store_sums<V, Weights>(task, i0, m, scratch.sums);
}

template <class V, class Weights, int MR>
void dgemv_float(const GemmTask& task) {
  KTS_DCHECKED(check_task(task, {Weights::kFormat, Rows::kBf16, Direction::kInputGrad}));
  if (task.m <= MR) {
    dgemv_one_block<V, Weights, MR>(task);
    return;
  }
  for (int64_t i = 0; i < task.m; i += kDgemvRows)
    dgemv_blocks<V, Weights, MR>(task, i, min_i64(kDgemvRows, task.m - i));
}

// Any number of rows: up to kTransposedRows from transposed dwords, else from widened weights.
template <class V, class Weights, int MR, int64_t kTransposedRows>
void dgrad_float(const GemmTask& task) {
  static_assert(kTransposedRows <= kDgemvRows);
  if (task.m <= kTransposedRows)
    dgemv_float<V, Weights, MR>(task);
  else
    dgrad_widened<V, Weights, MR>(task);
}

}  // namespace kts
