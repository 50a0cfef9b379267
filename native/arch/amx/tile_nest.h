// Loop nests on AMX tiles, as templates over TileOp (tile_op_hw.h, tile_op_model.h: the tile instructions) and Operands
// (operands_avx512.h, operands_plain.h: everything that is done to the bytes around them).
//
// A block of c is 2 x 2 tiles of 16 x 16: four sums, two tiles of A, two of B, so that four dot products need four tile
// loads. Both operands of a block are streams of steps; a step is two tiles side by side (row tiles of A, column tiles of
// B) that cover the same piece of the sum. A packed panel is such a stream as it is. A pass is the piece of the sum, 16
// steps, whose operands stay in the first- and second-level cache; sums go on from c in the next pass.
//
// Order of the sum: within a dot product as the CPU does it, dot products in ascending order. It does not depend on the
// number of rows nor on how columns are split.
#pragma once
#include <cstring>

#include "kts/kernel.h"
#include "tile_config.h"

namespace kts::amx {

inline constexpr int64_t kPassSteps = 16;
inline constexpr int64_t kStepBytes = 2 * kFullTileBytes;
inline constexpr int64_t kPassBytes = kPassSteps * kStepBytes;
inline constexpr int64_t kBlock = 32;                          // rows and columns of a block
inline constexpr int64_t kBlockBytes = kBlock * kBlock * 4;    // its sums
inline constexpr int64_t kGradRows = 192;                      // rows of the input gradient that share scratch
inline constexpr int64_t kGradStride = kGradRows + kTileRows;  // floats; off a power of two, for the cache sets
static_assert(kPanel == kBlock && kTileBytes == kFullTileBytes);

enum class Dot { kBf16, kS8 };

// Weights in memory are asked for this many steps ahead: tile loads alone keep too few lines in flight.
inline constexpr int64_t kPrefetchSteps = 3;

template <class TileOp>
KTS_INLINE void prefetch_step(const uint8_t* step) {
  for (int64_t line = 0; line < kStepBytes; line += 64) __builtin_prefetch(step + line);
}

template <class TileOp, int C>
KTS_INLINE void start_sum(const uint8_t* c, int64_t stride_bytes, bool from_c) {
  if (from_c)
    TileOp::template load<C>(c, stride_bytes);
  else
    TileOp::template zero<C>();
}

template <class TileOp, Dot kDot, int C, int A, int B>
KTS_INLINE void dot() {
  if constexpr (kDot == Dot::kBf16)
    TileOp::template dot_bf16<C, A, B>();
  else
    TileOp::template dot_s8<C, A, B>();
}

// c [16 kRows, 16 kCols] (+)= a b over `steps` steps. kCold: b comes from memory.
template <class TileOp, Dot kDot, TileShape kShape, int kRows, int kCols, bool kCold>
void multiply_tiles(const uint8_t* a, const uint8_t* b, int64_t steps, uint8_t* c, int64_t c_stride_bytes,
                    bool from_c) {
  constexpr int kABytes = tile_row_bytes(kShape, kTileA), kBRows = tile_rows(kShape, kTileB);
  constexpr int64_t kATile = kTileRows * kABytes, kBTile = kBRows * kTileRowBytes;
  uint8_t* bottom = c + kTileRows * c_stride_bytes;
  start_sum<TileOp, 0>(c, c_stride_bytes, from_c);
  if constexpr (kCols == 2) start_sum<TileOp, 1>(c + kTileRowBytes, c_stride_bytes, from_c);
  if constexpr (kRows == 2) start_sum<TileOp, 2>(bottom, c_stride_bytes, from_c);
  if constexpr (kRows == 2 && kCols == 2) start_sum<TileOp, 3>(bottom + kTileRowBytes, c_stride_bytes, from_c);
  for (int64_t t = 0; t < steps; ++t) {
    if constexpr (kCold) prefetch_step<TileOp>(b + kPrefetchSteps * kStepBytes);
    TileOp::template load<kTileB>(b, kTileRowBytes);
    TileOp::template load<kTileA>(a, kABytes);
    dot<TileOp, kDot, 0, kTileA, kTileB>();
    if constexpr (kCols == 2) {
      TileOp::template load<kTileB + 1>(b + kBTile, kTileRowBytes);
      dot<TileOp, kDot, 1, kTileA, kTileB + 1>();
    }
    if constexpr (kRows == 2) {
      TileOp::template load<kTileA + 1>(a + kATile, kABytes);
      dot<TileOp, kDot, 2, kTileA + 1, kTileB>();
    }
    if constexpr (kRows == 2 && kCols == 2) dot<TileOp, kDot, 3, kTileA + 1, kTileB + 1>();
    a += 2 * kATile;
    b += 2 * kBTile;
  }
  TileOp::template store<0>(c, c_stride_bytes);
  if constexpr (kCols == 2) TileOp::template store<1>(c + kTileRowBytes, c_stride_bytes);
  if constexpr (kRows == 2) TileOp::template store<2>(bottom, c_stride_bytes);
  if constexpr (kRows == 2 && kCols == 2) TileOp::template store<3>(bottom + kTileRowBytes, c_stride_bytes);
}

template <class TileOp, Dot kDot, TileShape kShape, bool kCold = false>
void multiply(int64_t row_tiles, int64_t col_tiles, const uint8_t* a, const uint8_t* b, int64_t steps, void* c,
              int64_t c_stride_bytes, bool from_c) {
  KTS_DCHECK(row_tiles >= 1 && row_tiles <= 2 && col_tiles >= 1 && col_tiles <= 2 && steps >= 1);
  KTS_DCHECK(is_aligned(a, 64) && is_aligned(b, 64) && c_stride_bytes % static_cast<int64_t>(sizeof(float)) == 0);
  using Fn = void (*)(const uint8_t*, const uint8_t*, int64_t, uint8_t*, int64_t, bool);
  static constexpr Fn kFns[2][2] = {
      {multiply_tiles<TileOp, kDot, kShape, 1, 1, kCold>, multiply_tiles<TileOp, kDot, kShape, 1, 2, kCold>},
      {multiply_tiles<TileOp, kDot, kShape, 2, 1, kCold>, multiply_tiles<TileOp, kDot, kShape, 2, 2, kCold>}};
  kFns[row_tiles - 1][col_tiles - 1](a, b, steps, static_cast<uint8_t*>(c), c_stride_bytes, from_c);
}

// What is left of a block in a matrix of `size` rows (columns) from `begin` on, in tiles.
KTS_INLINE int64_t tiles_from(int64_t begin, int64_t size) { return size - begin > kTileRows ? 2 : 1; }

template <class TileOp>
void copy_rows(const float* from, int64_t from_stride, float* to, int64_t to_stride, int64_t rows, int64_t col_tiles) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < col_tiles; ++j)
      std::memcpy(to + i * to_stride + j * kTileRows, from + i * from_stride + j * kTileRows, kTileRowBytes);
}

// A block of c with `rows` rows, 1 .. 32, which need not be whole tiles, and columns up to 32. edge: kBlockBytes.
template <class TileOp, Dot kDot, TileShape kShape>
void multiply_block(int64_t rows, int64_t col_tiles, const uint8_t* a, const uint8_t* b, int64_t steps, float* c,
                    int64_t ldc, bool from_c, bool cold, float* edge) {
  KTS_DCHECK(rows >= 1 && rows <= kBlock && (rows % kTileRows == 0 || edge != nullptr));
  if (col_tiles == 1 && !from_c)
    for (int64_t i = 0; i < rows; ++i) std::memset(c + i * ldc + kTileRows, 0, kTileRows * sizeof(float));
  const bool whole = rows % kTileRows == 0;
  float* sums = whole ? c : edge;
  const int64_t stride = whole ? ldc : kBlock;
  if (!whole && from_c) copy_rows<TileOp>(c, ldc, edge, kBlock, rows, col_tiles);
  auto* run = cold ? multiply<TileOp, kDot, kShape, true> : multiply<TileOp, kDot, kShape, false>;
  run(ceil_div(rows, kTileRows), col_tiles, a, b, steps, sums, stride * static_cast<int64_t>(sizeof(float)), from_c);
  if (!whole) copy_rows<TileOp>(edge, kBlock, c, ldc, rows, col_tiles);
}

// bf16 rows, forward. Scratch: a pass of A; a pass of unpacked B for every panel; an edge block.
template <class TileOp, class Operands, Format kFormat>
void forward_bf16_rows(const GemmTask& task) {
  KTS_DCHECKED(check_task(task, {kFormat, Rows::kBf16, Direction::kForward}));
  constexpr bool kUnpacks = kFormat != Format::kBf16;
  static_assert((1 + kMaxTaskPanels) * kPassBytes + kBlockBytes <= kGemmScratchBytes);
  const PackedMatrix& w = *task.w;
  const int64_t k_tiles = w.k_panels(), panels = task.panel_end - task.panel_begin;
  uint8_t* a = static_cast<uint8_t*>(task.scratch);
  uint8_t* unpacked = a + kPassBytes;
  float* edge = reinterpret_cast<float*>(unpacked + kMaxTaskPanels * kPassBytes);
  TileOp::configure(TileShape::kFull);
  for (int64_t t0 = 0; t0 < k_tiles; t0 += kPassSteps) {
    const int64_t steps = min_i64(kPassSteps, k_tiles - t0), k0 = t0 * kTileK;
    if constexpr (kUnpacks)
      for (int64_t p = 0; p < panels; ++p)
        for (int64_t t = 0; t < steps; ++t)
          Operands::template unpack_bf16<kFormat>(w, task.panel_begin + p, t0 + t,
                                                  unpacked + p * kPassBytes + t * kStepBytes);
    for (int64_t i = 0; i < task.m; i += kBlock) {
      const int64_t rows = min_i64(kBlock, task.m - i);
      Operands::gather_rows(task.a_rows + i, rows, task.a_offset + k0, w.k - k0, steps, kTileRowBytes, a);
      for (int64_t p = 0; p < panels; ++p) {
        const int64_t panel = task.panel_begin + p, n = panel * kPanel;
        const uint8_t* b = kUnpacks ? unpacked + p * kPassBytes : w.panel(panel) + t0 * kStepBytes;
        float* c = task.c + i * task.ldc + p * kPanel;
        multiply_block<TileOp, Dot::kBf16, TileShape::kFull>(rows, tiles_from(n, w.n), a, b, steps, c, task.ldc,
                                                             task.accumulate || t0 > 0, !kUnpacks && i == 0, edge);
        if (kFormat == Format::kInt8 && t0 + steps == k_tiles)
          Operands::scale_columns(w.int8_scales() + n, rows, c, task.ldc);
      }
    }
  }
}

// bf16 rows, input gradient: c^T [k, m] = W^T dy^T. With c^T the weights are the A operand, whose rows are one k and
// pieces of n; a packed tile holds pairs of k, so separating them is all it takes, while c itself would need every tile
// transposed. Pairs of the sum are (n, n + 16): then a row of A is the low (or high) halves of the dwords of the
// panel's two tiles, made by shifts and blends.
// Scratch: a pass of A for every panel; a pass of B = dy; c^T; one unpacked step.
template <class TileOp, class Operands, Format kFormat>
void input_grad_bf16_rows(const GemmTask& task) {
  KTS_DCHECKED(check_task(task, {kFormat, Rows::kBf16, Direction::kInputGrad}));
  constexpr int64_t kSumBytes = kMaxTaskPanels * kPanel * kGradStride * 4;
  static_assert((1 + kMaxTaskPanels) * kPassBytes + kSumBytes + kStepBytes <= kGemmScratchBytes);
  const PackedMatrix& w = *task.w;
  const int64_t panels = task.panel_end - task.panel_begin;
  uint8_t* weights = static_cast<uint8_t*>(task.scratch);
  uint8_t* dy = weights + kMaxTaskPanels * kPassBytes;
  float* sums = reinterpret_cast<float*>(dy + kPassBytes);
  uint8_t* step = reinterpret_cast<uint8_t*>(sums) + kSumBytes;
  const float* scales = kFormat == Format::kInt8 ? w.int8_scales() : nullptr;
  TileOp::configure(TileShape::kFull);
  for (int64_t i0 = 0; i0 < task.m; i0 += kGradRows) {
    const int64_t chunk = min_i64(kGradRows, task.m - i0);
    for (int64_t n0 = 0; n0 < w.n; n0 += kPassSteps * kPanel) {
      const int64_t steps = min_i64(kPassSteps, ceil_div(w.n - n0, kPanel));
      for (int64_t t = 0; t < steps; ++t)
        for (int64_t p = 0; p < panels; ++p) {
          const int64_t n_panel = n0 / kPanel + t, k_tile = task.panel_begin + p;
          const uint8_t* from = step;
          if constexpr (kFormat == Format::kBf16) {
            from = w.panel(n_panel) + k_tile * kStepBytes;
            prefetch_step<TileOp>(from + w.panel_stride_bytes);
          } else {
            Operands::template unpack_bf16<kFormat>(w, n_panel, k_tile, step);
          }
          Operands::split_pairs(from, weights + p * kPassBytes + t * kStepBytes);
        }
      for (int64_t i = 0; i < chunk; i += kBlock) {
        const int64_t rows = min_i64(kBlock, chunk - i);
        Operands::gather_pairs(task.a_rows + i0 + i, rows, task.a_offset + n0, w.n - n0, steps,
                               scales != nullptr ? scales + n0 : nullptr, dy);
        for (int64_t p = 0; p < panels; ++p)
          multiply<TileOp, Dot::kBf16, TileShape::kFull>(tiles_from((task.panel_begin + p) * kPanel, w.k),
                                                         ceil_div(rows, kTileRows), weights + p * kPassBytes, dy, steps,
                                                         sums + p * kPanel * kGradStride + i, kGradStride * 4, n0 > 0);
      }
    }
    for (int64_t p = 0; p < panels; ++p)
      Operands::add_transposed(sums + p * kPanel * kGradStride, kGradStride,
                               tiles_from((task.panel_begin + p) * kPanel, w.k), chunk,
                               task.c + i0 * task.ldc + p * kPanel, task.ldc, task.accumulate);
  }
}

// int8 rows. int8 weights: the int32 sums live in c until the last pass turns them into floats. int4 weights: the sums
// of a group of k are scaled and added to c. kShape: kHalf for groups of 32, whose sums end within a full tile.
// Scratch: a pass of A; a pass of unpacked B for every panel; sums of a block.
template <class TileOp, class Operands, Format kFormat, TileShape kShape>
void forward_s8_rows(const GemmTask& task) {
  KTS_DCHECKED(check_task(task, {kFormat, Rows::kInt8, Direction::kForward}));
  KTS_DCHECK(task.w->k <= kMaxInt8RowLength);
  constexpr int64_t kStepK = kShape == TileShape::kHalf ? kTileKQ / 2 : kTileKQ;
  constexpr int64_t kBytes = kStepK * kPanel;  // of a step of either operand
  const PackedMatrix& w = *task.w;
  const int64_t all_steps = ceil_div(w.k, kStepK), panels = task.panel_end - task.panel_begin;
  const int64_t group_steps = kFormat == Format::kInt4 ? w.format.group / kStepK : 0;
  uint8_t* a = static_cast<uint8_t*>(task.scratch);
  uint8_t* unpacked = a + kPassBytes;
  float* block = reinterpret_cast<float*>(unpacked + kMaxTaskPanels * kPassBytes);
  TileOp::configure(kShape);
  for (int64_t t0 = 0; t0 < all_steps; t0 += kPassSteps) {
    const int64_t steps = min_i64(kPassSteps, all_steps - t0), k0 = t0 * kStepK;
    if constexpr (kFormat == Format::kInt4)
      for (int64_t p = 0; p < panels; ++p)
        for (int64_t t = 0; t < steps; ++t)
          Operands::template unpack_s8<kShape>(w, task.panel_begin + p, t0 + t, unpacked + p * kPassBytes + t * kBytes);
    for (int64_t i = 0; i < task.m; i += kBlock) {
      const int64_t rows = min_i64(kBlock, task.m - i);
      Operands::gather_rows(task.q_rows + i, rows, task.a_offset + k0, align_up(w.k, kTileKQ) - k0, steps, kStepK, a);
      for (int64_t p = 0; p < panels; ++p) {
        const int64_t panel = task.panel_begin + p, n = panel * kPanel, col_tiles = tiles_from(n, w.n);
        float* c = task.c + i * task.ldc + p * kPanel;
        if constexpr (kFormat == Format::kInt8) {
          const uint8_t* b = w.panel(panel) + t0 * kStepBytes;
          multiply_block<TileOp, Dot::kS8, kShape>(rows, col_tiles, a, b, steps, c, task.ldc, t0 > 0, i == 0, block);
          if (t0 + steps == all_steps) Operands::scale_sums(w.int8_scales() + n, task.q_scales + i, rows, c, task.ldc);
        } else {
          for (int64_t t = 0; t < steps; t += group_steps) {
            const int64_t group = (t0 + t) / group_steps;
            multiply_block<TileOp, Dot::kS8, kShape>(
                align_up(rows, kTileRows), col_tiles, a + t * kBytes, unpacked + p * kPassBytes + t * kBytes,
                min_i64(group_steps, steps - t), block, kBlock, false, false, nullptr);
            Operands::add_group(block, w.int4_scales(panel) + group * kPanel, group == 0, rows, c, task.ldc);
          }
          if (t0 + steps == all_steps) Operands::scale_rows(task.q_scales + i, rows, c, task.ldc);
        }
      }
    }
  }
}

}  // namespace kts::amx
