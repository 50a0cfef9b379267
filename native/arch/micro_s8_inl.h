// Micro-kernels of int8 rows, written once on D, the dot products of an ISA; the kernels around them are in
// gemm_s8_inl.h, which says what they compute.
#pragma once
#include "kts/kernel.h"
#include "prefetch_inl.h"

namespace kts {

constexpr int64_t kRowOfTile = 64;  // bytes of 4 k of 16 n
constexpr int kChunk = 32;          // k of half a tile: one nibble of int4, the smallest group
constexpr int kRowsOfChunk = kChunk / 4;

// What one kernel is made of. kStreams: a gemv row.
template <class D_, Format kFormat_, int kBlockM_, bool kStreams_>
struct Int8RowsPlan {
  using D = D_;
  using V = typename D::V;
  static constexpr Format kFormat = kFormat_;
  static constexpr int kBlockM = kBlockM_;
  static constexpr bool kStreams = kStreams_;
  // Whole tiles and groups. W = 8 reads the two tiles of a panel one after the other: a short block of int8 lets them
  // come from memory together. int4 is faster in long blocks.
  static constexpr int64_t kBlockK = !kStreams || (kFormat == Format::kInt8 && V::W == 8) ? 512 : 8192;
  static constexpr int kParts = kFormat == Format::kInt8 ? D::kParts : 1;
  static constexpr bool kUnpacks = !kStreams && (kFormat == Format::kInt4 || kParts > 1);
  // Rows in scratch: part p of 4 k is the dword at p * kBlockK + k. Off a power of two: rows do not share cache sets.
  static constexpr int64_t kAStride = kParts * kBlockK + 64;
  // Weights as the micro-kernel reads them: tiles of kTileRows rows of kWeightRow bytes, two tiles side by side.
  static constexpr int64_t kWeightRow = kUnpacks ? kParts * kRowOfTile : kRowOfTile;
  static constexpr int64_t kTileRows = kFormat == Format::kInt4 && kStreams ? kRowsOfChunk : kTileKQ / 4;
  static constexpr int64_t kTile = kTileRows * kWeightRow;

  // Scratch: rows | minus 8 x sums of groups | values of one micro-kernel | one unpacked panel
  static constexpr int64_t kRows = kStreams ? kBlockM : 192;
  static constexpr int64_t kOffsetsAt = align_up(kRows * kAStride, 64);
  static constexpr int64_t kOffsetStride = kBlockK / kChunk;
  static constexpr int64_t kValuesAt = kOffsetsAt + kRows * kOffsetStride * 4;
  static constexpr int64_t kValueStride = 2 * V::W;
  static constexpr int64_t kWeightsAt = align_up(kValuesAt + kBlockM * kValueStride * 4 * 2, 64);
  static_assert(kWeightsAt + (kUnpacks ? kBlockK / kTileKQ * 2 * kTile : 0) <= kGemmScratchBytes);

  // A micro-kernel takes two vectors of columns: a panel (W = 16) or one of its tiles (W = 8).
  static constexpr int kCols = 2 * V::W;
  static constexpr int kSteps = kPanel / kCols;
  KTS_INLINE constexpr int64_t weights_at(int step) { return V::W == 16 ? 0 : step * kTile; }
  static constexpr int64_t kRight = V::W == 16 ? kTile : kRowOfTile / 2;
  static constexpr int64_t kPackedTile = kFormat == Format::kInt8 ? kTileBytes : kTileBytesInt4;
  // Packed bytes that stand for one row of the micro-kernel's tiles, and are asked for meanwhile.
  static constexpr int64_t kPackedRow = kUnpacks ? kPackedTile / (kTileKQ / 4) * (V::W == 16 ? 2 : 1) : kCols * 4;
};

// Sums of one row and vector are spread over several registers where few rows leave dot products waiting for each other.
template <class D, int R>
constexpr int kChains = D::kDotLatency <= 1 ? 1
                        : R == 1            ? 4
                        : R <= 4            ? 2
                                            : 1;
template <class D, int R>
constexpr int kUnroll = kChains<D, R> > 2 ? kChains<D, R> : 2;  // rows of a tile: loop counters cost issue slots

// One call of a micro-kernel: R rows, two vectors of columns, one k block.
struct Int8RowsPiece {
  const uint8_t* a;
  const uint8_t* w;
  const uint8_t* ahead;  // as many packed weights that will be needed later, in the order of memory
  int64_t chunks;        // of 32 k
  float* c;
  int64_t ldc;
  bool first, last;       // k block
  const float* q_scales;  // [R]
  // int8
  const float* scales;         // of the columns
  const int32_t* column_sums;  // of the columns
  // int4
  const bf16_t* group_scales;  // of the columns, groups kPanel apart
  int64_t group_chunks;
  const int32_t* offsets;  // [R][kOffsetStride], by group
  float* values;           // [2][R][2 W] scratch
};

// kCold: the time to ask for the weights that `ahead` points at.
template <class P, bool kCold>
KTS_INLINE void prefetch_weights(const uint8_t* ahead, int row) {
  if constexpr (kCold)
    for (int64_t line = row * P::kPackedRow; line < (row + 1) * P::kPackedRow; line += 64)
      if (line % 64 == 0) __builtin_prefetch(ahead + line);
}

// Inlined, the sums would spill among its callers' variables.
template <class P, int R, bool kCold>
[[gnu::noinline]] void micro_int8(const Int8RowsPiece& shared) {
  using D = typename P::D;
  using V = typename P::V;
  constexpr int C = kChains<D, R>;
  const Int8RowsPiece piece = shared;  // which no store can change
  typename V::I left[R * C], right[R * C];
  {
    const auto start0 = D::start(piece.column_sums), start1 = D::start(piece.column_sums + V::W);
#pragma GCC unroll 16
    for (int i = 0; i < R * C; ++i) {
      left[i] = i >= R ? V::set1_i(0) : piece.first ? start0 : D::load(piece.c + i * piece.ldc);
      right[i] = i >= R ? V::set1_i(0) : piece.first ? start1 : D::load(piece.c + i * piece.ldc + V::W);
    }
  }
  const uint8_t *a = piece.a, *w = piece.w, *ahead = piece.ahead;
  for (int64_t tiles = ceil_div(piece.chunks, 2); tiles > 0; --tiles) {
    for (int row = 0; row < kTileKQ / 4; row += kUnroll<D, R>) {
#pragma GCC unroll 4
      for (int u = 0; u < kUnroll<D, R>; ++u) {
        const int chain = u % C;
        prefetch_weights<P, kCold>(ahead, u);
#pragma GCC unroll 2
        for (int part = 0; part < P::kParts; ++part) {
          const auto w0 = D::template weights<P::kUnpacks>(w, part);
          const auto w1 = D::template weights<P::kUnpacks>(w + P::kRight, part);
#pragma GCC unroll 16
          for (int i = 0; i < R; ++i) {
            const auto x = D::broadcast(a + i * P::kAStride + part * P::kBlockK);
            left[chain * R + i] = D::dot_int8(left[chain * R + i], x, w0);
            right[chain * R + i] = D::dot_int8(right[chain * R + i], x, w1);
          }
        }
        a += 4;
        w += P::kWeightRow;
      }
      ahead += kUnroll<D, R> * P::kPackedRow;
    }
    w += P::kTile;  // the panel's other tile
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
    for (int chain = 1; chain < C; ++chain) {
      left[i] = V::add_i(left[i], left[chain * R + i]);
      right[i] = V::add_i(right[i], right[chain * R + i]);
    }
    float* c = piece.c + i * piece.ldc;
    if (piece.last) {
      const auto q_scale = V::set1(piece.q_scales[i]);
      V::store(c, V::mul(V::fma(D::to_f32(left[i]), V::load(piece.scales), V::zero()), q_scale));
      V::store(c + V::W, V::mul(V::fma(D::to_f32(right[i]), V::load(piece.scales + V::W), V::zero()), q_scale));
    } else {
      D::store(c, left[i]);
      D::store(c + V::W, right[i]);
    }
  }
}

// Adds 32 k. kHigh: they are the high halves of packed bytes.
template <class P, int R, bool kHigh, bool kCold>
KTS_INLINE void dot_chunk(const uint8_t* a, const uint8_t* w, const uint8_t* ahead, typename P::V::I* left,
                          typename P::V::I* right) {
  using D = typename P::D;
  for (int row = 0; row < kRowsOfChunk; row += kUnroll<D, R>) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll<D, R>; ++u) {
      const int chain = u % kChains<D, R>;
      prefetch_weights<P, kCold && !kHigh>(ahead, u);
      const auto w0 = D::template nibbles<P::kUnpacks, kHigh>(w);
      const auto w1 = D::template nibbles<P::kUnpacks, kHigh>(w + P::kRight);
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        const auto x = D::broadcast(a + i * P::kAStride);
        left[chain * R + i] = D::dot_int4(left[chain * R + i], w0, x);
        right[chain * R + i] = D::dot_int4(right[chain * R + i], w1, x);
      }
      a += 4;
      w += P::kWeightRow;
    }
    ahead += kUnroll<D, R> * P::kPackedRow;
  }
}

// value += scale * sum, both vectors of R rows.
template <class P, int R, class Sums>
KTS_INLINE void add_group(const Int8RowsPiece& piece, int64_t group, Sums&& sums) {
  using V = typename P::V;
  const auto scale0 = V::load_bf16(piece.group_scales + group * kPanel);
  const auto scale1 = V::load_bf16(piece.group_scales + group * kPanel + V::W);
  __asm__ volatile("" ::: "memory");  // values stay in memory: registers for them would be taken from the sums
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
    float* value = piece.values + i * P::kValueStride;
    V::store(value, V::fma(P::D::to_f32(sums(i, 0)), scale0, V::load(value)));
    V::store(value + V::W, V::fma(P::D::to_f32(sums(i, 1)), scale1, V::load(value + V::W)));
  }
}

// Sums of int16 hold 32 k; those of a longer group wait in memory.
template <class P, int R>
KTS_INLINE void park_sums(const Int8RowsPiece& piece, bool begins, typename P::V::I* left, typename P::V::I* right) {
  using D = typename P::D;
  using V = typename P::V;
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
    float* parked = piece.values + (R + i) * P::kValueStride;
    const auto sum0 = D::int4_sums(left[i]), sum1 = D::int4_sums(right[i]);
    D::store(parked, begins ? sum0 : V::add_i(sum0, D::load(parked)));
    D::store(parked + V::W, begins ? sum1 : V::add_i(sum1, D::load(parked + V::W)));
    left[i] = right[i] = V::set1_i(0);
  }
}

template <class P, int R, bool kCold>
[[gnu::noinline]] void micro_int4(const Int8RowsPiece& shared) {
  using D = typename P::D;
  using V = typename P::V;
  constexpr int C = kChains<D, R>;
  const Int8RowsPiece piece = shared;  // which no store can change
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < P::kCols; j += V::W)
      V::store(piece.values + i * P::kValueStride + j, piece.first ? V::zero() : V::load(piece.c + i * piece.ldc + j));
  for (int64_t chunk = 0, group = 0; chunk < piece.chunks; ++group) {
    const int64_t begin = chunk, end = min_i64(chunk + piece.group_chunks, piece.chunks);
    const auto offset = [&](int i) { return D::broadcast(piece.offsets + i * P::kOffsetStride + group); };
    typename V::I left[R * C], right[R * C];
#pragma GCC unroll 16
    for (int i = 0; i < R * C; ++i) left[i] = right[i] = D::kNarrowInt4Sums || i >= R ? V::set1_i(0) : offset(i);
    for (; chunk < end; ++chunk) {
      if constexpr (D::kNarrowInt4Sums)
        if (chunk > begin) park_sums<P, R>(piece, chunk == begin + 1, left, right);
      const uint8_t* a = piece.a + chunk * kChunk;
      const uint8_t* w = piece.w + chunk / 2 * 2 * P::kTile;
      if constexpr (P::kUnpacks) {
        dot_chunk<P, R, false, kCold>(a, w + chunk % 2 * kRowsOfChunk * P::kWeightRow,
                                      piece.ahead + chunk * kRowsOfChunk * P::kPackedRow, left, right);
      } else if (chunk % 2 == 0) {
        dot_chunk<P, R, false, kCold>(a, w, piece.ahead + chunk / 2 * kRowsOfChunk * P::kPackedRow, left, right);
      } else {
        dot_chunk<P, R, true, kCold>(a, w, nullptr, left, right);
      }
    }
    if constexpr (D::kNarrowInt4Sums) {
      if (end - begin > 1) {
        park_sums<P, R>(piece, false, left, right);
        add_group<P, R>(piece, group, [&](int i, int v) {
          return V::add_i(D::load(piece.values + (R + i) * P::kValueStride + v * V::W), offset(i));
        });
      } else {
        add_group<P, R>(piece, group,
                        [&](int i, int v) { return V::add_i(D::int4_sums(v == 0 ? left[i] : right[i]), offset(i)); });
      }
    } else {
#pragma GCC unroll 16
      for (int i = R; i < R * C; ++i) {
        left[i % R] = V::add_i(left[i % R], left[i]);
        right[i % R] = V::add_i(right[i % R], right[i]);
      }
      add_group<P, R>(piece, group, [&](int i, int v) { return v == 0 ? left[i] : right[i]; });
    }
  }
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < P::kCols; j += V::W) {
      const auto value = V::load(piece.values + i * P::kValueStride + j);
      V::store(piece.c + i * piece.ldc + j, piece.last ? V::mul(value, V::set1(piece.q_scales[i])) : value);
    }
}

}  // namespace kts
