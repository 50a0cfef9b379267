// Single weights by the formulas of kts/packed.h.
#include <cstring>

#include "kts/packed.h"

namespace kts {

int packed_code(const PackedMatrix& w, int64_t n, int64_t k) {
  const BlockTypeInfo& type = block_type_info(w.format.type);
  const uint8_t* tile = packed_block_tile(w, n, k) + n % kTileN * 4 + k % 4;
  if (type.bits == 8) return code_value(type, tile[k % kTileKQ / 4 * 64]);
  int stored = tile[k % 32 / 4 * 64] >> (k % kTileKQ < 32 ? 0 : 4) & 15;
  if (const int wide = type.bits - 4; wide > 0) {
    const int64_t line = type.bits == 5 ? k % kTileKQ / 32 : k % kTileKQ / 16;
    const int64_t shift = type.bits == 5 ? k % 32 / 4 : 2 * (k % 16 / 4);
    stored |= (tile[512 + line * 64] >> shift & ((1 << wide) - 1)) << 4;
  }
  return code_value(type, static_cast<uint8_t>(stored));
}

BlockScale packed_block_scale(const PackedMatrix& w, int64_t n, int64_t k) {
  KTS_DCHECK(w.holds(n, k));
  const BlockTypeInfo& type = block_type_info(w.format.type);
  const ScaleRecord at(type);
  const uint8_t* record = w.scale_record(n / kPanel, k);
  const int64_t lane = n % kPanel, group = k % type.block / type.group * kPanel + lane;
  uint16_t d = record[lane], dmin = 0;
  if (!type.is_e8m0) std::memcpy(&d, record + lane * 2, 2);
  if (type.has_offset) std::memcpy(&dmin, record + at.dmin + lane * 2, 2);
  const auto level = [&](bool has, int64_t offset) {
    return has ? static_cast<int8_t>(record[offset + group]) : int8_t{0};
  };
  return block_scale(type, d, dmin, level(type.two_levels, at.scale),
                     level(type.two_levels && type.has_offset, at.min));
}

float packed_unscaled(const PackedMatrix& w, int64_t n, int64_t k) {
  KTS_DCHECK(w.holds(n, k));
  if (is_block_format(w.format.kind)) {
    const BlockScale scale = packed_block_scale(w, n, k);
    return __builtin_fmaf(static_cast<float>(packed_code(w, n, k)), scale.factor, scale.offset);
  }
  if (w.format.kind == Format::kInt8) return static_cast<float>(packed_integer(w, n, k));
  if (w.format.kind == Format::kInt4) return static_cast<float>(packed_integer(w, n, k)) * packed_scale(w, n, k);
  const int64_t tile = k / kTileK * 2 + n % kPanel / kTileN;
  const uint16_t* elements = reinterpret_cast<const uint16_t*>(w.panel(n / kPanel)) + tile * kTileElements;
  if (w.format.kind == Format::kF16) return f16_to_f32(elements[k % kTileK * kTileN + n % kTileN]);
  return bf16_to_f32(elements[k % kTileK / 2 * 32 + n % kTileN * 2 + k % 2]);
}

}  // namespace kts
