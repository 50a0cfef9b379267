// int8 rows x packed int8 or int4 weights -> f32 through exact int32 sums, forward only. Written once on D, the dot
// products of an ISA; include only from gemm_s8_<isa>.cc. Results equal those of scalar/gemm_scalar.cc bit by
// bit:  value = fma(float(sum of the group), scale, value) for ascending groups (int8: one group), then value * q_scale.
//
// Range: |q| <= 127 for rows and int8 weights, so sums fit int32 up to k = 131072 (kMaxSumK, checked). Offsets that make
// an operand unsigned wrap around and cancel.
//   int8: where D wants unsigned rows they are read as q + 128, and sums start at -128 * column_sums[n].
//   int4: weights are stored as q + 8, which is unsigned: sums start at -8 * (sum of the row over the group).
//
// Rows are copied to scratch by k blocks, at a constant displacement from one pointer. The gemm kernels unpack int4 to
// bytes, and D with int16 products (kParts = 2) widens int8, a panel at a time for all row blocks; the first of them
// asks for the next panel meanwhile. The gemv kernels stream the packed bytes. Sums of one k block wait in c for the
// next one.
#pragma once
#include <immintrin.h>

#include "micro_s8_inl.h"
#include "with_rows_inl.h"

namespace kts {

constexpr int64_t kMaxSumK = 131072;  // 131072 * 127 * 127 < 2^31

// Packed tiles of one panel and k block -> the form of the micro-kernel.
template <class P>
KTS_INLINE void unpack_weights(const uint8_t* packed, int64_t tiles, uint8_t* to) {
  KTS_DCHECK(tiles >= 1 && tiles * kTileKQ <= P::kBlockK);
  for (int64_t t = 0; t < 2 * tiles; ++t)
    for (int64_t row = 0; row < P::kPackedTile / kRowOfTile; ++row) {
      const uint8_t* from = packed + t * P::kPackedTile + row * kRowOfTile;
      uint8_t* here = to + t * P::kTile + row * P::kWeightRow;
      __builtin_prefetch(from + kPrefetchBytes);
      for (int64_t j = 0; j < kRowOfTile; j += 4 * P::V::W) {
        if constexpr (P::kFormat == Format::kInt8) {
          for (int part = 0; part < P::kParts; ++part)
            P::D::store(here + part * kRowOfTile + j, P::D::template weights<false>(from + j, part));
        } else {
          P::D::store(here + j, P::D::template nibbles<false, false>(from + j));
          P::D::store(here + kRowsOfChunk * P::kWeightRow + j, P::D::template nibbles<false, true>(from + j));
        }
      }
    }
}

// Sum of 32 bytes, through the unsigned ones of q + 128. Every ISA of this file has AVX2.
KTS_INLINE int32_t sum_of_chunk(const int8_t* q) {
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q));
  const __m256i quads = _mm256_sad_epu8(_mm256_xor_si256(bytes, _mm256_set1_epi8(-128)), _mm256_setzero_si256());
  const __m128i pair = _mm_add_epi32(_mm256_castsi256_si128(quads), _mm256_extracti128_si256(quads, 1));
  return _mm_cvtsi128_si32(_mm_add_epi32(pair, _mm_unpackhi_epi64(pair, pair))) - kChunk * 128;
}

// Row i of the task to place `row` of scratch, k block at k0: whole tiles, which the zeros behind k fill.
template <class P>
KTS_INLINE void copy_row(const GemmTask& task, int64_t i, int64_t row, int64_t k0, int64_t tiles) {
  KTS_DCHECK(i >= 0 && i < task.m && row >= 0 && row < P::kRows && tiles >= 1 && tiles * kTileKQ <= P::kBlockK);
  uint8_t* scratch = static_cast<uint8_t*>(task.scratch);
  const int8_t* q = task.q_rows[i] + task.a_offset + k0;
  uint8_t* to = scratch + row * P::kAStride;
  for (int64_t j = 0; j < tiles * kTileKQ; j += 4 * P::V::W)
    for (int part = 0; part < P::kParts; ++part)
      P::D::store(to + part * P::kBlockK + j,
                  P::kFormat == Format::kInt8 ? P::D::row_part(P::D::load(q + j), part) : P::D::load(q + j));
  if constexpr (P::kFormat == Format::kInt4) {
    const int64_t group_chunks = task.w->format.group / kChunk;
    int32_t* offsets = reinterpret_cast<int32_t*>(scratch + P::kOffsetsAt) + row * P::kOffsetStride;
    for (int64_t begin = 0; begin < 2 * tiles; begin += group_chunks) {
      int32_t sum = 0;
      for (int64_t j = begin; j < min_i64(begin + group_chunks, 2 * tiles); ++j) sum += sum_of_chunk(q + j * kChunk);
      *offsets++ = -8 * sum;
    }
  }
}

template <class P, bool kCold>
KTS_INLINE void run_piece(const Int8RowsPiece& piece, int64_t rows) {
  with_rows<P::kBlockM>(rows, [&]<int R>() {
    if constexpr (P::kFormat == Format::kInt4)
      micro_int4<P, R, kCold>(piece);
    else
      micro_int8<P, R, kCold>(piece);
  });
}

// One panel, k block and group of up to kRows rows, whose copies are in scratch. next: the panel that follows.
template <class P>
struct Int8RowsPanel {
  const GemmTask& task;
  int64_t panel, k0, row_begin, rows;
  const uint8_t *packed, *next;

  void run() const {
    const PackedMatrix& w = *task.w;
    uint8_t* scratch = static_cast<uint8_t*>(task.scratch);
    const int64_t count = min_i64(P::kBlockK, w.k - k0), tiles = ceil_div(count, kTileKQ);
    if constexpr (P::kUnpacks) unpack_weights<P>(packed, tiles, scratch + P::kWeightsAt);
    Int8RowsPiece piece = {};
    piece.chunks = ceil_div(count, kChunk);
    piece.ldc = task.ldc;
    piece.first = k0 == 0;
    piece.last = k0 + count == w.k;
    piece.values = reinterpret_cast<float*>(scratch + P::kValuesAt);
    for (int step = 0; step < P::kSteps; ++step) {
      piece.w = (P::kUnpacks ? scratch + P::kWeightsAt : packed) + P::weights_at(step);
      // One step reads a panel in the order of memory.
      const uint8_t* later = P::kStreams && P::kSteps == 1 ? packed + kPrefetchBytes : next;
      piece.ahead = later + step * tiles * P::kPackedTile;
      aim_at_columns(piece, step);
      for (int64_t i = 0; i < rows; i += P::kBlockM) {
        piece.a = scratch + i * P::kAStride;
        piece.offsets = reinterpret_cast<const int32_t*>(scratch + P::kOffsetsAt) + i * P::kOffsetStride;
        piece.q_scales = task.q_scales + row_begin + i;
        piece.c = task.c + (row_begin + i) * task.ldc + (panel - task.panel_begin) * kPanel + step * P::kCols;
        if (P::kStreams || i == 0)
          run_piece<P, true>(piece, min_i64(P::kBlockM, rows - i));
        else
          run_piece<P, false>(piece, min_i64(P::kBlockM, rows - i));
      }
    }
  }

  void aim_at_columns(Int8RowsPiece& piece, int step) const {
    const PackedMatrix& w = *task.w;
    const int64_t col = panel * kPanel + step * P::kCols;
    if constexpr (P::kFormat == Format::kInt8) {
      piece.scales = w.int8_scales() + col;
      piece.column_sums = w.column_sums + col;
    } else {
      piece.group_chunks = w.format.group / kChunk;
      piece.group_scales = w.int4_scales(panel) + k0 / w.format.group * kPanel + step * P::kCols;
    }
  }
};

template <class P>
void gemm_int8_rows(const GemmTask& task) {
  KTS_DCHECKED(check_task(task, {P::kFormat, Rows::kInt8, Direction::kForward}));
  const PackedMatrix& w = *task.w;
  KTS_CHECK(w.k <= kMaxSumK, "int8 rows: expected at most 131072 inputs, so that sums fit int32");
  const auto packed = [&](int64_t panel, int64_t k0) { return w.panel(panel) + k0 / kTileKQ * 2 * P::kPackedTile; };
  for (int64_t row = 0; row < task.m; row += P::kRows)
    for (int64_t k0 = 0; k0 < w.k; k0 += P::kBlockK) {
      const int64_t rows = min_i64(P::kRows, task.m - row);
      for (int64_t i = 0; i < rows; ++i)
        copy_row<P>(task, row + i, i, k0, ceil_div(min_i64(P::kBlockK, w.k - k0), kTileKQ));
      for (int64_t p = task.panel_begin; p < task.panel_end; ++p) {
        const bool wraps = p + 1 == task.panel_end;
        const uint8_t* next = packed(wraps ? task.panel_begin : p + 1, wraps ? k0 + P::kBlockK : k0);
        Int8RowsPanel<P>{task, p, k0, row, rows, packed(p, k0), next}.run();
      }
    }
}

}  // namespace kts
