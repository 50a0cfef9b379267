// Packed weights (layouts in kts/packed.h) as vectors of floats, one reader per format, written once on Vec (W = 8 or
// 16 lanes = n). Include only from gemm_<format>_<isa>.cc.
//
// A row of 16 dwords (64 bytes) of a tile holds kPerDword consecutive k of each n: its phases. A reader hands out blocks
// of 32 k x the n of a tile or panel, as kRows rows of dwords; vector v of a block is its columns v * W ... From a vector
// of dwords, the weights of one phase:
//   bf16  shift or mask
//   int8  one byte shuffle to the top of the dword, then int32 -> f32: 2^24 times the value. The reader's kUnit undoes
//         it, exactly, where the column's scale is applied
//   int4  half bytes -> signed bytes q or 16 q, then as int8, times scale and 2^-24 or 2^-28: q * scale is a bf16 number,
//         so nothing is rounded
#pragma once
#include "prefetch_inl.h"

namespace kts {

// The tiles of all panels.
template <class V, int64_t kBytes>
class Tiles {
 public:
  static constexpr int64_t kTileRows = kBytes / 64;

  explicit Tiles(const PackedMatrix& w) : data_(w.panel(0)), panel_bytes_(w.panel_stride_bytes) {}

  int64_t panel_bytes() const { return panel_bytes_; }

  // Row `row` of dwords of the left (tile = 0) or right tiles of a panel, counted from k = 0.
  KTS_MEMBER const uint8_t* row(int64_t panel, int64_t tile, int64_t row) const {
    return data_ + panel * panel_bytes_ + (row / kTileRows * 2 + tile) * kBytes + row % kTileRows * 64;
  }
  // From `rows` on, in the tile and the tiles to its right: vector v of row j.
  KTS_INLINE const uint8_t* at(const uint8_t* rows, int v, int j) {
    return rows + j * 64 + v * V::W / kTileN * kBytes + v * V::W % kTileN * 4;
  }
  KTS_INLINE typename V::I load(const uint8_t* rows, int v, int j) { return V::load_i(at(rows, v, j)); }

  // Rows row ... row + W - 1: dwords[i], lane l: row + l of n = v * W + i. Asks for as many bytes of `ahead` panels
  // further, in the order of memory: asking for rows of the two tiles in turn costs a quarter to half of the bandwidth.
  KTS_MEMBER void transpose(int64_t panel, int64_t row, int v, int64_t ahead, typename V::I (&dwords)[V::W]) const {
    const uint8_t* rows = this->row(panel, 0, row);
#pragma GCC unroll 16
    for (int i = 0; i < V::W; ++i) {
      dwords[i] = load(rows, v, i);
    }
    constexpr int64_t kHere = V::W * V::W * 4;
    const uint8_t* next = data_ + (panel + ahead) * panel_bytes_ + row * 128 + v * kHere;
    for (int64_t i = 0; i < kHere; i += 64) __builtin_prefetch(next + i);
    V::transpose(dwords);
  }

 private:
  const uint8_t* data_;
  int64_t panel_bytes_;
};

struct NoScale {};

// What bf16 and int8 share: tiles of 1 KiB whose dwords are used as they are.
template <class V, int kDword>
class PlainWeights {
  using T = Tiles<V, kTileBytes>;

 public:
  using I = typename V::I;
  using F = typename V::F;
  static constexpr int kPerDword = kDword;
  static constexpr int kRows = kTileK / kPerDword;
  static constexpr int kRowsPerLine = 1;
  static constexpr int kHalves = 1;      // blocks that share their dwords
  static constexpr int kParts = 1;       // groups of a block, one after the other
  static constexpr int kExtraLines = 0;  // of a tile, beside those of its rows

  struct Block {
    const uint8_t* rows;
    KTS_MEMBER NoScale scale(int, int = 0) const { return {}; }
    KTS_MEMBER I dwords(int v, int j) const { return T::load(rows, v, j); }
  };

  int64_t panel_bytes() const { return tiles_.panel_bytes(); }
  static constexpr int64_t block_bytes() { return kRows * 2 * 64; }  // of 32 k of a panel

  // 32 k from kb * 32, columns from the given tile of the panel on.
  KTS_MEMBER Block block(int64_t panel, int64_t tile, int64_t kb) const {
    return {tiles_.row(panel, tile, kb * kRows)};
  }

  // As Tiles::transpose, W vectors of dwords; int4: then another W, `stride` vectors on, for the odd blocks.
  KTS_MEMBER void transpose(int64_t panel, int64_t row, int v, int64_t ahead, I* to, int64_t) const {
    I dwords[V::W];
    tiles_.transpose(panel, row, v, ahead, dwords);
#pragma GCC unroll 16
    for (int i = 0; i < V::W; ++i) to[i] = dwords[i];
  }

 protected:
  explicit PlainWeights(const PackedMatrix& w) : tiles_(w) {}

 private:
  T tiles_;
};

template <class V>
class Bf16Weights : public PlainWeights<V, 2> {
 public:
  static constexpr Format kFormat = Format::kBf16;
  static constexpr float kUnit = 1.0f;

  explicit Bf16Weights(const PackedMatrix& w) : PlainWeights<V, 2>(w) {}
  KTS_INLINE typename V::F weight(typename V::I dwords, NoScale, int phase) {
    return phase == 0 ? V::even(dwords) : V::odd(dwords);
  }
};

template <class V>
class Int8Weights : public PlainWeights<V, 4> {
 public:
  static constexpr Format kFormat = Format::kInt8;
  static constexpr float kUnit = 0x1p-24f;

  explicit Int8Weights(const PackedMatrix& w) : PlainWeights<V, 4>(w) {}
  KTS_INLINE typename V::F weight(typename V::I dwords, NoScale, int phase) { return V::top_byte(dwords, phase); }
};

template <class V>
class Int4Weights {
  using T = Tiles<V, kTileBytesInt4>;
  T tiles_;
  const bf16_t* scales_;
  int64_t panel_scales_;  // from the scales of a panel to those of the next
  int64_t blocks_;
  int group_shift_;  // blocks of 32 k per group, as a power of two

 public:
  using I = typename V::I;
  using F = typename V::F;
  static constexpr Format kFormat = Format::kInt4;
  static constexpr float kUnit = 1.0f;
  static constexpr int kPerDword = 4;
  static constexpr int kRows = kTileK / kPerDword;
  static constexpr int kRowsPerLine = 1;
  static constexpr int kHalves = 2;
  static constexpr int kParts = 1;
  static constexpr int kExtraLines = 0;

  // The half of a byte that blocks kb hold, and what undoes the factor that its weights come with.
  struct Half {
    I mask, bias;
    float unit;
    explicit KTS_MEMBER Half(int64_t kb)
        : mask(V::set1_i(kb % 2 == 0 ? 0x0f0f0f0fu : 0xf0f0f0f0u)),
          bias(V::set1_i(kb % 2 == 0 ? 0x08080808u : 0x80808080u)),
          unit(kb % 2 == 0 ? 0x1p-24f : 0x1p-28f) {}
  };
  struct Block {
    const uint8_t* rows;
    const bf16_t* scales;
    Half half{0};
    KTS_MEMBER F scale(int v, int = 0) const { return V::mul(V::load_bf16(scales + v * V::W), V::set1(half.unit)); }
    KTS_MEMBER I dwords(int v, int j) const { return V::nibbles(T::load(rows, v, j), half.mask, half.bias); }
  };

  explicit Int4Weights(const PackedMatrix& w)
      : tiles_(w),
        scales_(w.int4_scales(0)),
        panel_scales_(w.scale_stride_bytes / static_cast<int64_t>(sizeof(bf16_t))),
        blocks_(w.k_panels()),
        group_shift_(w.format.group == 32   ? 0
                     : w.format.group == 64 ? 1
                                            : 2) {}

  int64_t blocks() const { return blocks_; }
  int64_t panel_bytes() const { return tiles_.panel_bytes(); }
  static constexpr int64_t block_bytes() { return kRows * 64; }
  // Scales of the 32 n of a panel for block kb.
  KTS_MEMBER const bf16_t* scales(int64_t panel, int64_t kb) const {
    return scales_ + panel * panel_scales_ + (kb >> group_shift_) * kPanel;
  }
  KTS_MEMBER Block block(int64_t panel, int64_t tile, int64_t kb) const {
    return {tiles_.row(panel, tile, kb / 2 * kRows), scales(panel, kb) + tile * kTileN, Half(kb)};
  }
  KTS_INLINE F weight(I dwords, F scale, int phase) { return V::mul(V::top_byte(dwords, phase), scale); }
  KTS_INLINE F weight(I dwords, NoScale, int phase) { return V::top_byte(dwords, phase); }

  KTS_MEMBER void transpose(int64_t panel, int64_t row, int v, int64_t ahead, I* to, int64_t stride) const {
    const Half low(0), high(1);
    I dwords[V::W];
    tiles_.transpose(panel, row, v, ahead, dwords);
#pragma GCC unroll 16
    for (int i = 0; i < V::W; ++i) {
      to[i] = V::nibbles(dwords[i], low.mask, low.bias);
      to[stride + i] = V::nibbles(dwords[i], high.mask, high.bias);
    }
  }
};

}  // namespace kts
