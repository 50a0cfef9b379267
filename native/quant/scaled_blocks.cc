#include "kts/scaled_blocks.h"

#include <array>

#include "kts/block_types.h"

namespace kts {

namespace {

// Arithmetic on the bits would make denormal f32 of e4m3's denormals, which are common in weights and slow.
std::array<float, 256> fp8_table() {
  std::array<float, 256> table;
  for (int i = 0; i < 256; ++i) {
    const int exponent = i >> 3 & 15;
    const auto mantissa = static_cast<float>(i & 7);
    float value = mantissa * 0x1p-9f;
    if (exponent != 0) value = (8.0f + mantissa) * std::bit_cast<float>(static_cast<uint32_t>(exponent + 117) << 23);
    if ((i & 127) == 127) value = __builtin_nanf("");
    table[static_cast<size_t>(i)] = i < 128 ? value : -value;
  }
  return table;
}

KTS_INLINE void store(float value, const NumbersOut& out, int64_t at) {
  if (out.bf16 != nullptr)
    out.bf16[at] = f32_to_bf16(value);
  else
    out.f32[at] = value;
}

}  // namespace

void dequantize_fp8(const Fp8Blocks& from, int64_t row_begin, int64_t rows, int64_t cols, const NumbersOut& out) {
  static const std::array<float, 256> table = fp8_table();
  for (int64_t row = 0; row < rows; ++row) {
    const uint8_t* w = from.w + row * from.stride;
    const float* scales = from.scales + (row_begin + row) / from.block_rows * from.scale_stride;
    for (int64_t begin = 0; begin < cols; begin += from.block_cols) {
      const float scale = scales[begin / from.block_cols];
      const int64_t end = min_i64(begin + from.block_cols, cols);
      for (int64_t col = begin; col < end; ++col) store(table[w[col]] * scale, out, row * out.stride + col);
    }
  }
}

void dequantize_int4(const Int4Groups& from, int64_t rows, int64_t cols, const NumbersOut& out) {
  for (int64_t row = 0; row < rows; ++row) {
    const uint8_t* w = from.w + row * from.stride;
    for (int64_t begin = 0; begin < cols; begin += from.group) {
      const float scale = from.scales[row * from.scale_stride + begin / from.group];
      const int64_t end = min_i64(begin + from.group, cols);
      for (int64_t col = begin; col < end; ++col) {
        const int q = (w[col / 2] >> (col % 2 * 4) & 15) - 8;
        store(static_cast<float>(q) * scale, out, row * out.stride + col);
      }
    }
  }
}

void dequantize_mxfp4(const Mxfp4Groups& from, int64_t rows, int64_t cols, const NumbersOut& out) {
  constexpr const BlockTypeInfo& type = block_type_info(BlockType::kMxfp4);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t begin = 0; begin < cols; begin += type.group) {
      const uint8_t e = from.scales[row * from.scale_stride + begin / type.group];
      const float factor = e == 255 ? __builtin_nanf("") : block_scale(type, e, 0, 0, 0).factor;
      const uint8_t* w = from.w + row * from.stride + begin / 2;
      for (int i = 0; i < type.group; ++i) {
        const auto stored = static_cast<uint8_t>(w[i / 2] >> (i % 2 * 4) & 15);
        store(static_cast<float>(code_value(type, stored)) * factor, out, row * out.stride + begin + i);
      }
    }
}

}  // namespace kts
