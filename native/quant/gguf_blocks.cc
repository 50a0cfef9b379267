// Layout of each block: ggml/src/ggml-common.h (structs block_*). Byte offsets are written out; integers are little
// endian and unaligned.
#include "kts/gguf_blocks.h"

#include <cstring>

#include "gguf_grids.h"
#include "kts/block_types.h"

namespace kts {

namespace {

constexpr int kSuper = 256;  // elements of a super-block

KTS_INLINE uint32_t u16(const uint8_t* p) { return static_cast<uint32_t>(p[0] | p[1] << 8); }
KTS_INLINE uint32_t u32(const uint8_t* p) { return u16(p) | u16(p + 2) << 16; }
KTS_INLINE float f16(const uint8_t* p) { return f16_to_f32(static_cast<f16_t>(u16(p))); }
KTS_INLINE int nibble(const uint8_t* p, int i) { return p[i / 2] >> (i % 2 * 4) & 15; }

void f32_block(const uint8_t* b, float* y) { *y = std::bit_cast<float>(u32(b)); }
void f16_block(const uint8_t* b, float* y) { *y = f16(b); }
void bf16_block(const uint8_t* b, float* y) { *y = bf16_to_f32(static_cast<bf16_t>(u16(b))); }

// A type that the kernels take as it is.
template <BlockType kType>
void kernel_block(const uint8_t* b, float* y) {
  constexpr const BlockTypeInfo& type = block_type_info(kType);
  DecodedBlock block;
  decode_block(kType, b, &block);
  for (int g = 0; g < type.block / type.group; ++g) {
    const BlockScale scale = block_scale(type, block.d, block.dmin, block.scales[g], block.mins[g]);
    for (int i = g * type.group; i < (g + 1) * type.group; ++i) {
      const float product = scale.factor * static_cast<float>(code_value(type, block.stored[i]));
      y[i] = type.has_offset ? product + scale.offset : product;
    }
  }
}

// 16 scales (low half) and minima (high half) of 16 elements at 0, 2-bit q at 16, d at 80, dmin at 82.
// Element 128 h + 32 s + l has its bits at 2 s of byte 32 h + l.
void q2_k(const uint8_t* b, float* y) {
  const float d = f16(b + 80), dmin = f16(b + 82);
  for (int g = 0; g < 16; ++g) {
    const uint8_t* q = b + 16 + g / 8 * 32 + g % 2 * 16;
    const int shift = g % 8 / 2 * 2;
    const float scale = d * static_cast<float>(b[g] & 15), min = dmin * static_cast<float>(b[g] >> 4);
    for (int i = 0; i < 16; ++i) y[g * 16 + i] = scale * static_cast<float>(q[i] >> shift & 3) - min;
  }
}

// Inverted third bits at 0 (element 32 s + l: bit s of byte l), 2-bit q at 32 as in q2_k, 16 scales of 6 bits at 96:
// low halves in 8 bytes, then upper pairs of bits in 4; d at 108.
void q3_k(const uint8_t* b, float* y) {
  const float d = f16(b + 108);
  for (int g = 0; g < 16; ++g) {
    const int low = b[96 + g % 8] >> (g / 8 * 4) & 15, high = b[104 + g % 4] >> (g / 4 * 2) & 3;
    const float scale = d * static_cast<float>((low | high << 4) - 32);
    const uint8_t* q = b + 32 + g / 8 * 32 + g % 2 * 16;
    const uint8_t* third = b + g % 2 * 16;
    const int shift = g % 8 / 2 * 2;
    for (int i = 0; i < 16; ++i)
      y[g * 16 + i] = scale * static_cast<float>((q[i] >> shift & 3) - 4 + (third[i] >> (g / 2) & 1) * 4);
  }
}

// Five ternary digits a byte, as the fraction byte / 256: multiplying by 3^n and dropping the carry shifts digit n to
// the front. 32 bytes hold elements 32 n + l, 16 bytes 160 + 16 n + l, 4 bytes 240 + 4 n + l; d at 52.
void tq1_0(const uint8_t* b, float* y) {
  constexpr uint8_t kPowers[5] = {1, 3, 9, 27, 81};
  const float d = f16(b + 52);
  const auto digits = [&](const uint8_t* bytes, int count, int num_digits, float* out) {
    for (int n = 0; n < num_digits; ++n)
      for (int l = 0; l < count; ++l) {
        const auto shifted = static_cast<uint8_t>(bytes[l] * kPowers[n]);
        out[n * count + l] = d * static_cast<float>((shifted * 3 >> 8) - 1);
      }
  };
  digits(b, 32, 5, y);
  digits(b + 32, 16, 5, y + 160);
  digits(b + 48, 4, 4, y + 240);
}

void tq2_0(const uint8_t* b, float* y) {
  const float d = f16(b + 64);
  for (int g = 0; g < 8; ++g)
    for (int i = 0; i < 32; ++i) y[g * 32 + i] = d * static_cast<float>((b[g / 4 * 32 + i] >> (g % 4 * 2) & 3) - 1);
}

// Negated if the lowest bit of `sign` is set.
KTS_INLINE float signed_value(float value, uint32_t sign) {
  return std::bit_cast<float>(std::bit_cast<uint32_t>(value) ^ sign << 31);
}

// Eight elements of a codebook entry of 2-bit digits; bit i of `signs` negates element i.
KTS_INLINE void iq2_entry(uint32_t code, uint32_t signs, float scale, float* y) {
  for (int i = 0; i < 8; ++i)
    y[i] = signed_value(scale * static_cast<float>(kIq2Values[code >> (2 * i) & 3]), signs >> i);
}

// Seven stored sign bits, the eighth makes their number even.
KTS_INLINE uint32_t even_signs(uint32_t seven) {
  return seven | static_cast<uint32_t>(__builtin_popcount(seven) & 1) << 7;
}

KTS_INLINE float half_up(float d, int scale, float unit) { return d * (0.5f + static_cast<float>(scale)) * unit; }

// Groups of 32: four entry numbers, then four times 7 signs and a 4-bit scale in 32 bits.
void iq2_xxs(const uint8_t* b, float* y) {
  const float d = f16(b);
  for (int g = 0; g < 8; ++g) {
    const uint8_t* at = b + 2 + g * 8;
    const uint32_t rest = u32(at + 4);
    const float scale = half_up(d, static_cast<int>(rest >> 28), 0.25f);
    for (int l = 0; l < 4; ++l)
      iq2_entry(kIq2XxsGrid[at[l]], even_signs(rest >> (7 * l) & 127), scale, y + g * 32 + l * 8);
  }
}

// 32 times a 9-bit entry number and 7 signs, then 4-bit scales of 16 elements.
void iq2_xs(const uint8_t* b, float* y) {
  const float d = f16(b);
  for (int e = 0; e < 32; ++e) {
    const uint32_t q = u16(b + 2 + e * 2);
    iq2_entry(kIq2XsGrid[q & 511], even_signs(q >> 9), half_up(d, nibble(b + 66, e / 2), 0.25f), y + e * 8);
  }
}

// Entry numbers at 2 with two more bits at 66, signs at 34, 4-bit scales of 16 elements at 74.
void iq2_s(const uint8_t* b, float* y) {
  const float d = f16(b);
  for (int e = 0; e < 32; ++e) {
    const int entry = b[2 + e] | (b[66 + e / 4] >> (e % 4 * 2) & 3) << 8;
    iq2_entry(kIq2sGrid[entry], b[34 + e], half_up(d, nibble(b + 74, e / 2), 0.25f), y + e * 8);
  }
}

// Groups of 32: eight entries of four elements; signs and scale as in iq2_xxs, all of them at 66.
void iq3_xxs(const uint8_t* b, float* y) {
  const float d = f16(b);
  for (int g = 0; g < 8; ++g) {
    const uint32_t rest = u32(b + 66 + g * 4);
    const float scale = half_up(d, static_cast<int>(rest >> 28), 0.5f);
    for (int e = 0; e < 8; ++e) {
      const uint32_t code = kIq3XxsGrid[b[2 + g * 8 + e]], signs = even_signs(rest >> (e / 2 * 7) & 127) >> (e % 2 * 4);
      for (int i = 0; i < 4; ++i)
        y[g * 32 + e * 4 + i] =
            signed_value(scale * static_cast<float>(kIq3XxsValues[code >> (i * 4) & 7]), signs >> i);
    }
  }
}

// Entry numbers at 2 with one more bit at 66, signs at 74, 4-bit scales of 32 elements at 106.
void iq3_s(const uint8_t* b, float* y) {
  const float d = f16(b);
  for (int e = 0; e < 64; ++e) {
    const float scale = d * static_cast<float>(1 + 2 * nibble(b + 106, e / 8));
    const uint32_t code = kIq3sGrid[b[2 + e] | (b[66 + e / 8] >> (e % 8) & 1) << 8];
    const uint32_t signs = b[74 + e / 2] >> (e % 2 * 4);
    for (int i = 0; i < 4; ++i)
      y[e * 4 + i] = signed_value(scale * static_cast<float>(2 * (code >> (i * 4) & 7) + 1), signs >> i);
  }
}

constexpr float kIq1Delta = 0.125f;

KTS_INLINE void iq1_entry(int entry, float delta, float scale, float* y) {
  for (int i = 0; i < 8; ++i) {
    const int digit = kIq1sGrid[entry] >> (2 * i) & 3;
    y[i] = scale * (static_cast<float>(digit - 1) + delta);
  }
}

// Entry numbers at 2; per group of 32 at 34: four times three more bits, a 3-bit scale, the sign of the shift.
void iq1_s(const uint8_t* b, float* y) {
  const float d = f16(b);
  for (int e = 0; e < 32; ++e) {
    const auto rest = static_cast<int>(u16(b + 34 + e / 4 * 2));
    const float delta = (rest & 0x8000) != 0 ? -kIq1Delta : kIq1Delta;
    const float scale = d * static_cast<float>(2 * (rest >> 12 & 7) + 1);
    iq1_entry(b[2 + e] | (rest >> (e % 4 * 3) & 7) << 8, delta, scale, y + e * 8);
  }
}

// Entry numbers at 0; at 32 a half byte for each: three more bits and the sign of the shift. At 48 four times 16 bits:
// 3-bit scales of 16 elements below, a quarter of the f16 d on top.
void iq1_m(const uint8_t* b, float* y) {
  uint32_t bits = 0;
  for (int i = 0; i < 4; ++i) bits |= u16(b + 48 + i * 2) >> 12 << (4 * i);
  const float d = f16_to_f32(static_cast<f16_t>(bits));
  for (int e = 0; e < 32; ++e) {
    const int rest = nibble(b + 32, e), scale = static_cast<int>(u16(b + 48 + e / 8 * 2) >> (e % 8 / 2 * 3) & 7);
    const float delta = (rest & 8) != 0 ? -kIq1Delta : kIq1Delta;
    iq1_entry(b[e] | (rest & 7) << 8, delta, d * static_cast<float>(2 * scale + 1), y + e * 8);
  }
}

// Four groups of 16 with unsigned e4m3 scales, halved; 0x7f stands for zero.
void nvfp4(const uint8_t* b, float* y) {
  constexpr const BlockTypeInfo& fp4 = block_type_info(BlockType::kMxfp4);
  for (int g = 0; g < 4; ++g) {
    const int exponent = b[g] >> 3 & 15;
    const auto mantissa = static_cast<float>(b[g] & 7);
    const float power = std::bit_cast<float>(static_cast<uint32_t>(exponent + 120) << 23);  // 2^(exponent - 7)
    const float raw = exponent == 0 ? mantissa * 0x1p-9f : (1.0f + mantissa / 8.0f) * power;
    const float d = b[g] == 0x7f ? 0.0f : raw * 0.5f;
    for (int i = 0; i < 16; ++i)
      y[g * 16 + i] = d * static_cast<float>(fp4.table[b[4 + g * 8 + i % 8] >> (i / 8 * 4) & 15]);
  }
}

template <int kElements, int kBytes, void (*kBlock)(const uint8_t*, float*)>
constexpr GgmlType ggml_type(const char* name) {
  return {name, kElements, kBytes, [](const uint8_t* blocks, int64_t count, float* out) {
            for (int64_t i = 0; i < count; ++i) kBlock(blocks + i * kBytes, out + i * kElements);
          }};
}

template <BlockType kType>
constexpr GgmlType kernel_type(const char* name) {
  return ggml_type<block_type_info(kType).block, block_type_info(kType).block_bytes, kernel_block<kType>>(name);
}

constexpr GgmlType kTypes[] = {
    ggml_type<1, 4, f32_block>("F32"),         ggml_type<1, 2, f16_block>("F16"),
    ggml_type<1, 2, bf16_block>("BF16"),       kernel_type<BlockType::kQ4_0>("Q4_0"),
    kernel_type<BlockType::kQ4_1>("Q4_1"),     kernel_type<BlockType::kQ5_0>("Q5_0"),
    kernel_type<BlockType::kQ5_1>("Q5_1"),     kernel_type<BlockType::kQ8_0>("Q8_0"),
    ggml_type<kSuper, 84, q2_k>("Q2_K"),       ggml_type<kSuper, 110, q3_k>("Q3_K"),
    kernel_type<BlockType::kQ4_K>("Q4_K"),     kernel_type<BlockType::kQ5_K>("Q5_K"),
    kernel_type<BlockType::kQ6_K>("Q6_K"),     ggml_type<kSuper, 54, tq1_0>("TQ1_0"),
    ggml_type<kSuper, 66, tq2_0>("TQ2_0"),     ggml_type<kSuper, 66, iq2_xxs>("IQ2_XXS"),
    ggml_type<kSuper, 74, iq2_xs>("IQ2_XS"),   ggml_type<kSuper, 82, iq2_s>("IQ2_S"),
    ggml_type<kSuper, 98, iq3_xxs>("IQ3_XXS"), ggml_type<kSuper, 110, iq3_s>("IQ3_S"),
    ggml_type<kSuper, 50, iq1_s>("IQ1_S"),     ggml_type<kSuper, 56, iq1_m>("IQ1_M"),
    kernel_type<BlockType::kIq4Nl>("IQ4_NL"),  kernel_type<BlockType::kIq4Xs>("IQ4_XS"),
    kernel_type<BlockType::kMxfp4>("MXFP4"),   ggml_type<64, 36, nvfp4>("NVFP4"),
};

KTS_INLINE void store(const float* values, int64_t count, float* out) {
  std::memcpy(out, values, static_cast<size_t>(count) * sizeof(float));
}

KTS_INLINE void store(const float* values, int64_t count, bf16_t* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = f32_to_bf16(values[i]);
}

template <class T>
void dequantize(const GgmlType& type, const uint8_t* blocks, int64_t stride_bytes, int64_t rows, int64_t cols, T* out,
                int64_t stride) {
  KTS_DCHECK(cols % type.block_elements == 0);
  float values[kMaxGgmlBlock];
  const int64_t step = kMaxGgmlBlock / type.block_elements;  // blocks of `values`: a block may be a single number
  for (int64_t row = 0; row < rows; ++row) {
    const uint8_t* at = blocks + row * stride_bytes;
    for (int64_t block = 0, num_blocks = cols / type.block_elements; block < num_blocks; block += step) {
      const int64_t count = min_i64(step, num_blocks - block);
      type.decode(at + block * type.block_bytes, count, values);
      store(values, count * type.block_elements, out + row * stride + block * type.block_elements);
    }
  }
}

}  // namespace

const GgmlType* find_ggml_type(const char* name) {
  for (const GgmlType& type : kTypes)
    if (std::strcmp(type.name, name) == 0) return &type;
  return nullptr;
}

void dequantize_gguf(const GgmlType& type, const uint8_t* blocks, int64_t stride_bytes, int64_t rows, int64_t cols,
                     float* out, int64_t stride) {
  dequantize(type, blocks, stride_bytes, rows, cols, out, stride);
}

void dequantize_gguf(const GgmlType& type, const uint8_t* blocks, int64_t stride_bytes, int64_t rows, int64_t cols,
                     bf16_t* out, int64_t stride) {
  dequantize(type, blocks, stride_bytes, rows, cols, out, stride);
}

}  // namespace kts
