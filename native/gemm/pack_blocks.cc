// Rows of a GGUF file -> tiles and records of scales (formulas in kts/packed.h), and single weights back.
#include <cstring>

#include "kts/packed.h"

namespace kts {

namespace {

template <class T>
T* writable(const void* memory) {
  return static_cast<T*>(const_cast<void*>(memory));
}

bool is_finite_f16(uint16_t bits) { return (bits & 0x7c00u) != 0x7c00u; }

// The tile of 16 n x 64 k that holds W[n, k].
const uint8_t* tile_of(const PackedMatrix& w, int64_t n, int64_t k) {
  const int64_t tile = k / kTileKQ * 2 + n % kPanel / kTileN;
  return w.panel(n / kPanel) + tile * block_tile_bytes(block_bits(w.format.kind));
}

void or_dword(uint8_t* to, uint32_t bits) {
  uint32_t dword;
  std::memcpy(&dword, to, 4);
  dword |= bits;
  std::memcpy(to, &dword, 4);
}

// 32 stored codes of row n from k on, into zeros; a dword holds those of 4 k.
void scatter_codes(const PackedMatrix& w, int64_t n, int64_t k, const uint8_t* stored) {
  const int bits = block_bits(w.format.kind), wide = bits - 4;
  const int half = static_cast<int>(k % kTileKQ / kTileK);
  uint8_t* lane = const_cast<uint8_t*>(tile_of(w, n, k)) + n % kTileN * 4;
  for (int row = 0; row < kTileK / 4; ++row) {
    uint32_t codes;
    std::memcpy(&codes, stored + 4 * row, 4);
    if (bits == 8) {
      std::memcpy(lane + (half * 8 + row) * 64, &codes, 4);
      continue;
    }
    or_dword(lane + row * 64, (codes & 0x0f0f0f0fu) << 4 * half);
    if (wide == 0) continue;
    const int rows_of_line = 8 / wide;
    const uint32_t high = codes >> 4 & (wide == 1 ? 0x01010101u : 0x03030303u);
    or_dword(lane + 512 + (half * wide + row / rows_of_line) * 64, high << row % rows_of_line * wide);
  }
}

void store_scales(const PackedMatrix& w, int64_t n, int64_t k, const DecodedBlock& block) {
  const BlockTypeInfo& type = block_type_info(w.format.type);
  const ScaleRecord at(type);
  uint8_t* record = const_cast<uint8_t*>(w.scale_record(n / kPanel, k));
  const int64_t lane = n % kPanel;
  if (type.is_e8m0)
    record[lane] = static_cast<uint8_t>(block.d);
  else
    std::memcpy(record + lane * 2, &block.d, 2);
  if (type.has_offset) std::memcpy(record + at.dmin + lane * 2, &block.dmin, 2);
  for (int64_t g = 0; type.two_levels && g < type.block / type.group; ++g) {
    record[at.scale + g * kPanel + lane] = static_cast<uint8_t>(block.scales[g]);
    if (type.has_offset) record[at.min + g * kPanel + lane] = static_cast<uint8_t>(block.mins[g]);
  }
}

void pack_block_row(const uint8_t* row, const PackedMatrix& w, int64_t n) {
  const BlockTypeInfo& type = block_type_info(w.format.type);
  DecodedBlock block;
  for (int64_t k = 0; k < w.k; k += type.block, row += type.block_bytes) {
    decode_block(w.format.type, row, &block);
    const bool is_finite =
        type.is_e8m0 ? block.d != 255 : is_finite_f16(block.d) && (!type.has_offset || is_finite_f16(block.dmin));
    KTS_CHECK(is_finite, "weights: expected finite scales, found NaN or infinity");
    for (int64_t i = 0; i < type.block; i += kTileK) scatter_codes(w, n, k + i, block.stored + i);
    store_scales(w, n, k, block);
  }
}

void pack_f16_panel(const uint8_t* w, int64_t row_bytes, const PackedMatrix& packed, int64_t panel) {
  for (int64_t n = panel * kPanel; n < min_i64((panel + 1) * kPanel, packed.n); ++n)
    for (int64_t k = 0; k < packed.k; ++k) {
      uint16_t bits;
      std::memcpy(&bits, w + n * row_bytes + k * 2, 2);
      KTS_CHECK(is_finite_f16(bits), "weights: expected finite numbers, found NaN or infinity");
      const int64_t tile = k / kTileK * 2 + n % kPanel / kTileN;
      writable<f16_t>(packed.panel(panel))[tile * kTileElements + k % kTileK * kTileN + n % kTileN] = bits;
    }
}

// Zeros beyond n and k: scales of zero make them weights of zero.
void clear_panel(const PackedMatrix& w, int64_t panel) {
  std::memset(writable<uint8_t>(w.panel(panel)), 0, static_cast<size_t>(panel_value_bytes(w.format, w.k)));
  const int64_t scales = panel_scale_bytes(w.format, w.k);
  if (scales > 0) std::memset(writable<uint8_t>(w.panel_scales(panel)), 0, static_cast<size_t>(scales));
}

}  // namespace

int64_t WeightFormat::k_unit() const {
  if (is_block_format(kind)) return block_type_info(type).block > kTileKQ ? block_type_info(type).block : kTileKQ;
  return group > kTileKQ ? group : kTileKQ;
}

int64_t block_row_bytes(WeightFormat format, int64_t k) {
  KTS_CHECK(format.kind >= Format::kF16, "weights: only f16 and block types are loaded from blocks");
  if (format.kind == Format::kF16) return k * 2;
  const BlockTypeInfo& type = block_type_info(format.type);
  return k / type.block * type.block_bytes;
}

void pack_block_panels(const uint8_t* w, int64_t row_bytes, const PackedMatrix& packed, int64_t panel_begin,
                       int64_t panel_end) {
  KTS_CHECK(packed.format.kind >= Format::kF16, "weights: only f16 and block types are loaded from blocks");
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    clear_panel(packed, panel);
    if (packed.format.kind == Format::kF16) {
      pack_f16_panel(w, row_bytes, packed, panel);
      continue;
    }
    for (int64_t n = panel * kPanel; n < min_i64((panel + 1) * kPanel, packed.n); ++n)
      pack_block_row(w + n * row_bytes, packed, n);
  }
}

int packed_code(const PackedMatrix& w, int64_t n, int64_t k) {
  const BlockTypeInfo& type = block_type_info(w.format.type);
  const uint8_t* tile = tile_of(w, n, k) + n % kTileN * 4 + k % 4;
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
