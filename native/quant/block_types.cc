// Blocks of GGUF files -> codes and scales. Byte layouts are those of ggml's block_* structs.
#include "kts/block_types.h"

#include <bit>
#include <cstring>

#include "kts/types.h"

namespace kts {

namespace {

uint16_t load_u16(const uint8_t* p) { return static_cast<uint16_t>(p[0] | p[1] << 8); }
uint32_t load_u32(const uint8_t* p) {
  return static_cast<uint32_t>(load_u16(p)) | static_cast<uint32_t>(load_u16(p + 2)) << 16;
}

// 2 * half codes: low halves of the bytes first.
void split_nibbles(const uint8_t* bytes, int half, uint8_t* stored) {
  for (int i = 0; i < half; ++i) stored[i] = bytes[i] & 15, stored[half + i] = bytes[i] >> 4;
}

// A 6-bit scale and min of each of 8 groups in 12 bytes (Q4_K, Q5_K).
void split_scales(const uint8_t* packed, DecodedBlock* block) {
  for (int g = 0; g < 4; ++g) {
    block->scales[g] = static_cast<int8_t>(packed[g] & 63);
    block->mins[g] = static_cast<int8_t>(packed[g + 4] & 63);
    block->scales[g + 4] = static_cast<int8_t>((packed[g + 8] & 15) | packed[g] >> 6 << 4);
    block->mins[g + 4] = static_cast<int8_t>(packed[g + 8] >> 4 | packed[g + 4] >> 6 << 4);
  }
}

void decode_32(BlockType type, const uint8_t* p, DecodedBlock* block) {
  if (type == BlockType::kMxfp4) {
    block->d = p[0];
    split_nibbles(p + 1, 16, block->stored);
    return;
  }
  block->d = load_u16(p);
  p += 2;
  if (block_type_info(type).has_offset) block->dmin = load_u16(p), p += 2;
  if (type == BlockType::kQ8_0) {
    std::memcpy(block->stored, p, 32);
    return;
  }
  const bool has_fifth = block_type_info(type).bits == 5;
  const uint32_t fifth = has_fifth ? load_u32(p) : 0;
  split_nibbles(p + (has_fifth ? 4 : 0), 16, block->stored);
  for (int i = 0; has_fifth && i < 32; ++i)
    block->stored[i] = static_cast<uint8_t>(block->stored[i] | (fifth >> i & 1) << 4);
}

void decode_q6_k(const uint8_t* p, DecodedBlock* block) {
  const uint8_t *low = p, *high = p + 128;
  for (int half = 0; half < 2; ++half)
    for (int i = 0; i < 32; ++i)
      for (int quarter = 0; quarter < 4; ++quarter) {
        const int nibble = low[half * 64 + quarter % 2 * 32 + i] >> quarter / 2 * 4 & 15;
        const int two = high[half * 32 + i] >> 2 * quarter & 3;
        block->stored[half * 128 + quarter * 32 + i] = static_cast<uint8_t>(nibble | two << 4);
      }
  std::memcpy(block->scales, p + 192, 16);
  block->d = load_u16(p + 208);
}

void decode_iq4_xs(const uint8_t* p, DecodedBlock* block) {
  block->d = load_u16(p);
  const int high = load_u16(p + 2);
  for (int g = 0; g < 8; ++g) {
    const int low = p[4 + g / 2] >> g % 2 * 4 & 15;
    block->scales[g] = static_cast<int8_t>((low | (high >> 2 * g & 3) << 4) - 32);
    split_nibbles(p + 8 + 16 * g, 16, block->stored + 32 * g);
  }
}

void decode_k(BlockType type, const uint8_t* p, DecodedBlock* block) {
  block->d = load_u16(p);
  block->dmin = load_u16(p + 2);
  split_scales(p + 4, block);
  const bool has_fifth = type == BlockType::kQ5_K;
  const uint8_t *fifth = p + 16, *low = has_fifth ? p + 48 : p + 16;
  for (int pair = 0; pair < 4; ++pair) {
    uint8_t* stored = block->stored + 64 * pair;
    split_nibbles(low + 32 * pair, 32, stored);
    for (int i = 0; has_fifth && i < 64; ++i)
      stored[i] = static_cast<uint8_t>(stored[i] | (fifth[i % 32] >> (2 * pair + i / 32) & 1) << 4);
  }
}

// e8m0, halved: 2^(e - 128).
float e8m0_half(uint32_t e) { return std::bit_cast<float>(e < 2 ? 0x00200000u << e : (e - 1) << 23); }

}  // namespace

BlockType block_type_from_name(const char* name) {
  for (int i = 0; i < kNumBlockTypes; ++i)
    if (std::strcmp(name, kBlockTypes[i].name) == 0) return static_cast<BlockType>(i);
  return BlockType::kNone;
}

void decode_block(BlockType type, const uint8_t* bytes, DecodedBlock* block) {
  const BlockTypeInfo& info = block_type_info(type);
  if (info.block == 32)
    decode_32(type, bytes, block);
  else if (type == BlockType::kQ6_K)
    decode_q6_k(bytes, block);
  else if (type == BlockType::kIq4Xs)
    decode_iq4_xs(bytes, block);
  else
    decode_k(type, bytes, block);
}

BlockScale block_scale(const BlockTypeInfo& type, uint16_t d, uint16_t dmin, int8_t scale, int8_t min) {
  BlockScale result{type.is_e8m0 ? e8m0_half(d) : f16_to_f32(d), type.has_offset ? f16_to_f32(dmin) : 0.0f};
  if (!type.two_levels) return result;
  result.factor *= static_cast<float>(scale);
  if (type.has_offset) result.offset *= -static_cast<float>(min);
  return result;
}

}  // namespace kts
