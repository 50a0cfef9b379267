// Packed weights: ONE copy of W [n, k] (a torch Linear weight: n outputs, k inputs) that both products read.
//
// Tiles of 16 n, two of them side by side a panel of 32 n; the tiles of a panel are one contiguous stream along k.
//   bf16: tile of 16 n x 32 k, 1 KiB   t = (n / 32 * ceil(k / 32) + k / 32) * 2 + n % 32 / 16
//         element t * 512 + k % 32 / 2 * 32 + n % 16 * 2 + k % 2
//   int8: tile of 16 n x 64 k, 1 KiB   t = (n / 32 * ceil(k / 64) + k / 64) * 2 + n % 32 / 16
//         byte t * 1024 + k % 64 / 4 * 64 + n % 16 * 4 + k % 4         two's complement, -127 .. 127
//   int4: tile of 16 n x 64 k, 512 B   t as int8
//         byte t * 512 + k % 32 / 4 * 64 + n % 16 * 4 + k % 4          low half: k % 64 < 32, high half: the others;
//         holds q + 8, q in -8 .. 7
// so a dword holds one n and the 2 (bf16) or 4 (int8, int4) consecutive k that AMX and the dot instructions take, and
// 32 consecutive k of any tile are contiguous rows of 64 bytes.
// Values beyond n and k are zero. W[n, k] = q * scale:
//   int8: scale f32 [align_up(n, 32)], one per output channel n
//   int4: scale bf16, index (n / 32 * ceil(k / group) + k / group) * 32 + n % 32. Every scale has at most 5 significant
//         bits, so q * scale is a bf16 number: all kernels compute with the very same weights (but see any_scale).
//
// Block types of GGUF files (kts/block_types.h), nothing rounded:
//   f16     tile of 16 n x 32 k, 1 KiB, t as bf16: element t * 512 + k % 32 * 16 + n % 16
//   block8  codes as int8, in tiles of 1 KiB
//   block4  stored codes in tiles of 512 B, as int4 (without the 8)
//   block5  the low 4 bits as block4, then 128 B: byte t * 640 + 512 + k % 64 / 32 * 64 + n % 16 * 4 + k % 4, bit k % 32 / 4
//   block6  the low 4 bits as block4, then 256 B: byte t * 768 + 512 + k % 64 / 16 * 64 + n % 16 * 4 + k % 4,
//           bits k % 16 / 4 * 2 and the next
// Scales, in records of 32 n and one block of the type, record n / 32 * ceil(k / block) + k / block:
//   d [32] (f16; e8m0: one byte each), then m or dmin [32] f16 if the type has offsets, then with two levels
//   scale [block / group][32] int8 and, with offsets, min [block / group][32] int8
//
// So values and scales of a panel are streams of equal steps along k. The formulas above are of a matrix that lies alone;
// the columns of a larger one, from a whole unit of k on (WeightFormat::k_unit), have the same streams further apart.
// Whoever reads a panel asks PackedMatrix where it begins.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kts/base.h"
#include "kts/block_types.h"
#include "kts/types.h"

namespace kts {

// What kernels differ in. kBlock<bits>: block types by the bits of their codes.
enum class Format : int {
  kBf16 = 0,
  kInt8 = 1,
  kInt4 = 2,
  kF16 = 3,
  kBlock4 = 4,
  kBlock5 = 5,
  kBlock6 = 6,
  kBlock8 = 7
};

KTS_INLINE constexpr bool is_block_format(Format format) { return format >= Format::kBlock4; }
// Bits of the codes of a block format.
KTS_INLINE constexpr int block_bits(Format format) {
  return format == Format::kBlock8 ? 8 : static_cast<int>(format) - static_cast<int>(Format::kBlock4) + 4;
}

struct WeightFormat {
  Format kind = Format::kBf16;
  int group = 0;                      // int4: consecutive k that share a scale: 32, 64 or 128
  BlockType type = BlockType::kNone;  // block formats
  // int4: scales are any finite bf16 numbers, as checkpoints store them (pack_stored_int4 in kts/pack.h), and q * scale has up to 11
  // significant bits. Kernels that sum in f32 compute with it as it is, those with bf16 operands round it to bf16.
  bool any_scale = false;

  bool operator==(const WeightFormat&) const = default;
  // The k that a cut of a matrix along k, and its first one, must be a multiple of.
  int64_t k_unit() const;
};

inline constexpr int kTileN = 16;
inline constexpr int kTileK = 32;   // k of a bf16 tile
inline constexpr int kTileKQ = 64;  // k of an int8 or int4 tile
inline constexpr int kPanel = 32;   // columns of both directions come in panels of this width
inline constexpr int kTileElements = kTileN * kTileK;
inline constexpr int kTileBytes = 1024;  // bf16 and int8
inline constexpr int kTileBytesInt4 = 512;

// Bytes of a tile of 16 n x 64 k of a block format.
KTS_INLINE constexpr int64_t block_tile_bytes(int bits) { return bits == 8 ? kTileBytes : 512 + 128 * (bits - 4); }

// Where the parts of a record of scales begin, in bytes.
struct ScaleRecord {
  int64_t dmin, scale, min, bytes;
  __attribute__((always_inline)) explicit constexpr ScaleRecord(const BlockTypeInfo& type)
      : dmin(type.is_e8m0 ? kPanelBytes : 2 * kPanelBytes),
        scale(dmin + (type.has_offset ? 2 * kPanelBytes : 0)),
        min(scale + (type.two_levels ? type.block / type.group * kPanelBytes : 0)),
        bytes(min + (type.two_levels && type.has_offset ? type.block / type.group * kPanelBytes : 0)) {}

 private:
  static constexpr int64_t kPanelBytes = 32;
};

// A view of packed weights; the memory belongs to others.
struct PackedMatrix {
  WeightFormat format;
  int64_t n = 0;
  int64_t k = 0;
  const void* data = nullptr;
  const void* scales = nullptr;          // int8: f32, int4: bf16; as above
  const int32_t* column_sums = nullptr;  // int8: sum over k of q [align_up(n, 32)]
  int64_t panel_stride_bytes = 0;        // from the values of a panel to those of the next
  int64_t scale_stride_bytes = 0;        // the same of the scales

  int64_t n_panels() const { return ceil_div(n, kPanel); }
  int64_t k_panels() const { return ceil_div(k, kPanel); }
  KTS_CHECKED_MEMBER int64_t k_groups() const {
    KTS_DCHECK(format.kind == Format::kInt4 && format.group > 0);
    return ceil_div(k, format.group);
  }
  KTS_CHECKED_MEMBER const float* int8_scales() const {
    KTS_DCHECK(format.kind == Format::kInt8);
    return static_cast<const float*>(scales);
  }
  // Whether W[row, column] is a weight of the matrix.
  KTS_MEMBER bool holds(int64_t row, int64_t column) const { return row >= 0 && row < n && column >= 0 && column < k; }

  // The values of a panel.
  KTS_MEMBER const uint8_t* panel(int64_t index) const {
    return static_cast<const uint8_t*>(data) + index * panel_stride_bytes;
  }
  // Its scales.
  KTS_MEMBER const uint8_t* panel_scales(int64_t index) const {
    return static_cast<const uint8_t*>(scales) + index * scale_stride_bytes;
  }
  // int4: [k_groups()][32].
  KTS_MEMBER const bf16_t* int4_scales(int64_t panel) const {
    KTS_DCHECK(format.kind == Format::kInt4);
    return reinterpret_cast<const bf16_t*>(panel_scales(panel));
  }
  // Block formats: the record of scales of a panel's block that holds column k.
  KTS_MEMBER const uint8_t* scale_record(int64_t panel, int64_t column) const {
    KTS_DCHECK(is_block_format(format.kind) && format.type != BlockType::kNone && panel >= 0 && column >= 0);
    const BlockTypeInfo& type = block_type_info(format.type);
    return panel_scales(panel) + column / type.block * ScaleRecord(type).bytes;
  }
};

// Integer of one int8 or int4 weight, by the formulas above: for tests and scalar kernels.
KTS_INLINE int packed_integer(const PackedMatrix& w, int64_t n, int64_t k) {
  KTS_DCHECK((w.format.kind == Format::kInt8 || w.format.kind == Format::kInt4) && w.holds(n, k));
  const int64_t tile = k / kTileKQ * 2 + n % kPanel / kTileN;  // of the panel
  const uint8_t* panel = w.panel(n / kPanel);
  if (w.format.kind == Format::kInt8)
    return static_cast<int8_t>(panel[tile * kTileBytes + k % kTileKQ / 4 * 64 + n % kTileN * 4 + k % 4]);
  const uint8_t pair = panel[tile * kTileBytesInt4 + k % kPanel / 4 * 64 + n % kTileN * 4 + k % 4];
  return (k % kTileKQ < kPanel ? pair & 15 : pair >> 4) - 8;
}

// Scale of one int8 or int4 weight.
KTS_INLINE float packed_scale(const PackedMatrix& w, int64_t n, int64_t k) {
  KTS_DCHECK((w.format.kind == Format::kInt8 || w.format.kind == Format::kInt4) && w.holds(n, k));
  if (w.format.kind == Format::kInt8) return w.int8_scales()[n];
  return bf16_to_f32(w.int4_scales(n / kPanel)[k / w.format.group * kPanel + n % kPanel]);
}

// The tile of 16 n x 64 k of a block format that holds W[n, k].
KTS_INLINE const uint8_t* packed_block_tile(const PackedMatrix& w, int64_t n, int64_t k) {
  KTS_DCHECK(is_block_format(w.format.kind) && w.holds(n, k));
  const int64_t tile = k / kTileKQ * 2 + n % kPanel / kTileN;  // of the panel
  return w.panel(n / kPanel) + tile * block_tile_bytes(block_bits(w.format.kind));
}

// Scale and code (code_value) of a weight of a block format.
BlockScale packed_block_scale(const PackedMatrix& w, int64_t n, int64_t k);
int packed_code(const PackedMatrix& w, int64_t n, int64_t k);

// One weight, without the scale of int8.
float packed_unscaled(const PackedMatrix& w, int64_t n, int64_t k);

}  // namespace kts
