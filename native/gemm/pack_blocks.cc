// Rows of a GGUF file -> tiles and records of scales (formulas in kts/packed.h).
#include <cstring>

#include "kts/pack.h"

namespace kts {

namespace {

template <class T>
T* writable(const void* memory) {
  return static_cast<T*>(const_cast<void*>(memory));
}

bool is_finite_f16(uint16_t bits) { return (bits & 0x7c00u) != 0x7c00u; }

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
  uint8_t* lane = const_cast<uint8_t*>(packed_block_tile(w, n, k)) + n % kTileN * 4;
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

void pack_block_panels(const uint8_t* w, int64_t row_bytes, const PackedMatrix& packed, int64_t panel_begin,
                       int64_t panel_end) {
  KTS_DCHECKED(check_panels(packed, panel_begin, panel_end));
  KTS_DCHECK(w != nullptr && row_bytes >= block_row_bytes(packed.format, packed.k));
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

}  // namespace kts
