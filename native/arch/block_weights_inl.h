// Block types of GGUF files (kts/block_types.h) as vectors of floats: a reader like those of weights_inl.h, for codes of
// 4, 5, 6 or 8 bits. What types of one width differ in (table, bias, levels of scales, offsets) is read at run time, once
// per group. Include only from gemm_<format>_<isa>.cc.
//
// A weight is fma(2^24 code, factor 2^-24, offset): one rounding, of the sum, which types without offset do not have.
#pragma once
#include "weights_inl.h"

namespace kts {

// f16: rows of one k.
template <class V>
class F16Weights {
 public:
  using I = typename V::I;
  using F = typename V::F;
  static constexpr Format kFormat = Format::kF16;
  static constexpr float kUnit = 1.0f;
  static constexpr int kPerDword = 1;
  static constexpr int kRows = kTileK;
  static constexpr int kRowsPerLine = 2;
  static constexpr int kHalves = 1;
  static constexpr int kParts = 1;
  static constexpr int kExtraLines = 0;

  struct Block {
    const uint8_t* rows;
    KTS_MEMBER NoScale scale(int, int = 0) const { return {}; }
    KTS_MEMBER I dwords(int v, int j) const {
      const uint8_t* at = rows + v * V::W / kTileN * kTileBytes + v * V::W % kTileN * 2 + j * (2 * kTileN);
      return V::as_i(V::load_f16(reinterpret_cast<const f16_t*>(at)));
    }
  };

  explicit F16Weights(const PackedMatrix& w) : data_(w.panel(0)), panel_bytes_(w.panel_stride_bytes) {}
  int64_t panel_bytes() const { return panel_bytes_; }
  static constexpr int64_t block_bytes() { return 2 * kTileBytes; }
  KTS_MEMBER Block block(int64_t panel, int64_t tile, int64_t kb) const {
    return {data_ + panel * panel_bytes_ + (kb * 2 + tile) * kTileBytes};
  }
  KTS_INLINE F weight(I value, NoScale, int) { return V::as_f(value); }

 private:
  const uint8_t* data_;
  int64_t panel_bytes_;
};

template <class V, int kBits_>
class BlockWeights {
 public:
  using I = typename V::I;
  using F = typename V::F;
  static constexpr int kBits = kBits_;
  static constexpr Format kFormat = kBits == 8 ? Format::kBlock8 : static_cast<Format>(kBits);
  static constexpr float kUnit = 1.0f;
  static constexpr int kPerDword = 4;
  static constexpr int kRows = kTileK / kPerDword;
  static constexpr int kRowsPerLine = 1;
  static constexpr int kHalves = kBits == 8 ? 1 : 2;
  static constexpr int kParts = kBits == 6 ? 2 : 1;  // groups of a block of 32 k
  static constexpr int64_t kTile = block_tile_bytes(kBits);
  // Lines of a tile after the dwords of its rows.
  static constexpr int kExtraLines = kBits == 8 ? 0 : 2 * (kBits - 4);

  struct Scale {
    F factor, offset;
  };

  // 32 k of the columns from tile `tile` of a panel on.
  struct Block {
    const uint8_t* rows;
    const BlockWeights* weights;
    const uint8_t* record;
    int group;  // of the record
    int lane;   // first column
    int shift;  // of the stored codes in their bytes

    KTS_MEMBER Scale scale(int v, int part = 0) const {
      return weights->group_scale(record, group + part, lane + v * V::W);
    }
    KTS_MEMBER const uint8_t* at(int v) const { return rows + v * V::W / kTileN * kTile + v * V::W % kTileN * 4; }
    KTS_MEMBER I dwords(int v, int j) const { return weights->codes(at(v), shift, j); }

    // As stored: row j of dwords, whose bytes hold two codes, and the line with the further bits of a group.
    KTS_MEMBER I row(int v, int j) const { return V::load_i(at(v) + j * 64); }
    template <bool kHigh>
    KTS_MEMBER I high_line(int v, int part) const {
      if constexpr (kBits == 4 || kBits == 8) return V::set1_i(0);
      return V::load_i(at(v) + 512 + (kHigh * (kBits - 4) + part) * 64);
    }
  };

  explicit BlockWeights(const PackedMatrix& w)
      : data_(w.panel(0)),
        scales_(w.panel_scales(0)),
        type_(block_type_info(w.format.type)),
        at_(type_),
        panel_bytes_(w.panel_stride_bytes),
        panel_scales_(w.scale_stride_bytes),
        record_shift_(type_.block == 256 ? 3 : 0),
        table_(V::load_table(type_.table)),
        bias_(V::set1_i(static_cast<uint32_t>(type_.bias) * 0x01010101u)) {}

  // Whether codes of 4 bits are more than integers with a bias.
  bool has_table() const { return type_.table[15] != type_.table[0] + 15; }
  KTS_MEMBER I table() const { return table_; }
  // What a stored code has too much.
  KTS_MEMBER int32_t bias(bool takes_table) const {
    if constexpr (kBits == 4) return takes_table ? 0 : -type_.table[0];
    return type_.bias;
  }

  int64_t panel_bytes() const { return panel_bytes_; }
  static constexpr int64_t block_bytes() { return kTile; }  // of 32 k of a panel

  KTS_MEMBER Block block(int64_t panel, int64_t tile, int64_t kb) const {
    const int64_t record = kb >> record_shift_;
    const uint8_t* rows = data_ + panel * panel_bytes_ + (kb / 2 * 2 + tile) * kTile;
    return {kBits == 8 ? rows + kb % 2 * kRows * 64 : rows,
            this,
            scales_ + panel * panel_scales_ + record * at_.bytes,
            static_cast<int>(kb - (record << record_shift_)) * kParts,
            static_cast<int>(tile) * kTileN,
            static_cast<int>(kb % 2) * 4};
  }

  KTS_INLINE F weight(I dwords, const Scale& scale, int phase) {
    return V::fma(V::top_byte(dwords, phase), scale.factor, scale.offset);
  }

 private:
  // Of W columns from `lane` of the panel on; the factor times 2^-24, which top_byte asks for.
  KTS_MEMBER Scale group_scale(const uint8_t* record, int group, int lane) const {
    const auto f16_at = [&](int64_t at) { return V::load_f16(reinterpret_cast<const f16_t*>(record + at) + lane); };
    const int64_t bytes = group * kPanel + lane;
    Scale scale{type_.is_e8m0 ? V::load_e8m0(record + lane) : V::mul(f16_at(0), V::set1(0x1p-24f)), V::zero()};
    if (type_.has_offset) scale.offset = f16_at(at_.dmin);
    if (type_.two_levels) {
      scale.factor = V::mul(scale.factor, V::load_int8(record + at_.scale + bytes));
      if (type_.has_offset)
        scale.offset = V::mul(scale.offset, V::sub(V::zero(), V::load_int8(record + at_.min + bytes)));
    }
    return scale;
  }

  // Codes of row j of dwords, as signed bytes.
  KTS_MEMBER I codes(const uint8_t* rows, int shift, int j) const {
    if constexpr (kBits == 8) return V::load_i(rows + j * 64);
    const I low = V::and_i(V::srl_by(V::load_i(rows + j * 64), shift), V::set1_i(0x0f0f0f0fu));
    if constexpr (kBits == 4) {
      return V::look_up(table_, low);
    } else {
      constexpr int kWide = kBits - 4, kRowsOfLine = 8 / kWide;
      const int64_t line = shift / 4 * kWide + j / kRowsOfLine;
      const I high = V::and_i(V::srl_by(V::load_i(rows + 512 + line * 64), j % kRowsOfLine * kWide),
                              V::set1_i(kBits == 5 ? 0x01010101u : 0x03030303u));
      return V::sub_i8(V::or_i(low, V::template sll_i16<4>(high)), bias_);
    }
  }

  const uint8_t *data_, *scales_;
  const BlockTypeInfo& type_;
  const ScaleRecord at_;
  int64_t panel_bytes_, panel_scales_;
  int record_shift_;  // blocks of 32 k per record, as a power of two
  I table_, bias_;
};

}  // namespace kts
