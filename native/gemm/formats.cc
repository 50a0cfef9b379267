// Names and sizes of packed weights.
#include <string>

#include "kts/kernel.h"
#include "kts/pack.h"

namespace kts {

namespace {

int64_t value_bytes(WeightFormat format, int64_t n, int64_t k) {
  return ceil_div(n, kPanel) * panel_value_bytes(format, k);
}

int64_t scale_bytes(WeightFormat format, int64_t n, int64_t k) {
  return ceil_div(n, kPanel) * panel_scale_bytes(format, k);
}

int64_t sum_bytes(WeightFormat format, int64_t n) {
  return format.kind == Format::kInt8 ? align_up(n, kPanel) * static_cast<int64_t>(sizeof(int32_t)) : 0;
}

}  // namespace

int64_t panel_value_bytes(WeightFormat format, int64_t k) {
  if (format.kind == Format::kBf16 || format.kind == Format::kF16) return kPanel * align_up(k, kTileK) * 2;
  if (is_block_format(format.kind)) return 2 * ceil_div(k, kTileKQ) * block_tile_bytes(block_bits(format.kind));
  return kPanel * align_up(k, kTileKQ) / (format.kind == Format::kInt8 ? 1 : 2);
}

int64_t panel_scale_bytes(WeightFormat format, int64_t k) {
  if (format.kind == Format::kInt8) return kPanel * static_cast<int64_t>(sizeof(float));
  if (format.kind == Format::kInt4) return kPanel * ceil_div(k, format.group) * static_cast<int64_t>(sizeof(bf16_t));
  if (!is_block_format(format.kind)) return 0;
  const BlockTypeInfo& type = block_type_info(format.type);
  return ceil_div(k, type.block) * ScaleRecord(type).bytes;
}

int64_t packed_bytes(WeightFormat format, int64_t n, int64_t k) {
  return value_bytes(format, n, k) + align_up(scale_bytes(format, n, k), 64) + align_up(sum_bytes(format, n), 64);
}

PackedMatrix packed_view(WeightFormat format, int64_t n, int64_t k, const void* memory) {
  KTS_DCHECK(n > 0 && k > 0 && is_aligned(memory, 64));
  const char* base = static_cast<const char*>(memory);
  PackedMatrix view{format, n, k, base, nullptr, nullptr, panel_value_bytes(format, k), panel_scale_bytes(format, k)};
  const char* scales = base + value_bytes(format, n, k);
  if (scale_bytes(format, n, k) > 0) view.scales = scales;
  if (format.kind == Format::kInt8)
    view.column_sums = reinterpret_cast<const int32_t*>(scales + align_up(scale_bytes(format, n, k), 64));
  return view;
}

#if KTS_HAS_CONTRACTS
void check_panels(const PackedMatrix& w, int64_t begin, int64_t end) {
  check_weights(w);
  KTS_DCHECK(0 <= begin && begin <= end && end <= w.n_panels());
}
#endif

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

const char* kernel_format_name(Format format) {
  static constexpr const char* kNames[] = {"bf16", "int8", "int4", "f16", "block4", "block5", "block6", "block8"};
  return kNames[static_cast<int>(format)];
}

const char* format_name(WeightFormat format) {
  if (format.any_scale) return "rawint4";
  return is_block_format(format.kind) ? block_type_info(format.type).name : kernel_format_name(format.kind);
}

void check_format(WeightFormat format, int64_t k) {
  if (!is_block_format(format.kind) || k % block_type_info(format.type).block == 0) return;
  const BlockTypeInfo& type = block_type_info(format.type);
  fail(("weights in " + std::string(type.name) + ": expected rows of whole blocks of " + std::to_string(type.block) +
        ", got " + std::to_string(k) + " columns")
           .c_str());
}

WeightFormat weight_format(const char* name, int group) {
  const BlockType type = block_type_from_name(name);
  if (type != BlockType::kNone) {
    const int bits = block_type_info(type).bits;
    const int kind = static_cast<int>(Format::kBlock4) + (bits == 8 ? 3 : bits - 4);
    return {static_cast<Format>(kind), 0, type};
  }
  for (const Format kind : {Format::kBf16, Format::kInt8, Format::kInt4, Format::kF16}) {
    const bool any_scale = kind == Format::kInt4 && std::string(name) == "rawint4";
    if (std::string(name) != kernel_format_name(kind) && !any_scale) continue;
    if (kind != Format::kInt4) return {kind, 0};
    KTS_CHECK(group == 32 || group == 64 || group == 128, "int4 group_size: expected 32, 64 or 128");
    return {kind, group, BlockType::kNone, any_scale};
  }
  std::string gguf = "f16";
  for (const BlockTypeInfo& info : kBlockTypes) gguf += std::string(", ") + info.name;
  fail(("format: expected bf16, int8, int4 or rawint4, or a type of GGUF files (" + gguf + "), got " + name).c_str());
}

}  // namespace kts
