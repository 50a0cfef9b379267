// A packed matrix of chosen integers, written by the formulas of kts/packed.h and not by the packer.
#pragma once
#include <cmath>
#include <cstring>
#include <vector>

#include "check.h"
#include "kts/gemm.h"

namespace kts::test {

// 64-byte aligned memory filled with a byte.
class Bytes {
 public:
  Bytes(int64_t count, int fill) : storage_(static_cast<size_t>(count) + 64, static_cast<char>(fill)) {}
  char* data() { return storage_.data() + (64 - reinterpret_cast<uintptr_t>(storage_.data()) % 64) % 64; }

 private:
  std::vector<char> storage_;
};

enum class Values {
  kSmallIntegers,  // every product and sum is exact in f32; scales are powers of two
  kReals,
};

// What a kernel of this format takes.
inline std::vector<WeightFormat> formats_of(Format kernel) {
  if (kernel == Format::kInt4)
    return {
        {Format::kInt4, 32}, {Format::kInt4, 64}, {Format::kInt4, 128}, {Format::kInt4, 32, BlockType::kNone, true}};
  if (!is_block_format(kernel)) return {{kernel, 0}};
  std::vector<WeightFormat> formats;
  for (const BlockTypeInfo& type : kBlockTypes)
    if (const WeightFormat format = weight_format(type.name, 0); format.kind == kernel) formats.push_back(format);
  return formats;
}

struct PackedProblem {
  WeightFormat format;
  int64_t n, k;
  Bytes memory;
  std::vector<float> unscaled;  // [n, k]: q for int8, q * scale (and offset) else
  std::vector<float> scale;     // [n]: of int8, else ones

  PackedProblem(WeightFormat f, int64_t n_, int64_t k_, Values values, Random& random)
      : format(f),
        n(n_),
        k(k_),
        memory(packed_bytes(f, n_, k_), 0),
        unscaled(static_cast<size_t>(n_ * k_)),
        scale(static_cast<size_t>(n_), 1.0f) {
    for (int64_t i = 0; i < n && f.kind == Format::kInt8; ++i)
      scale[at(i)] =
          values == Values::kReals ? 0.01f + random.real() * 0.009f : std::ldexp(1.0f, random.integer(-2, 2));
    PackedMatrix view = matrix();
    if (f.kind == Format::kBf16) fill_bf16(view, values, random);
    if (f.kind == Format::kInt8) fill_int8(view, values, random);
    if (f.kind == Format::kInt4) fill_int4(view, values, random);
    if (f.kind >= Format::kF16) fill_blocks(view, values, random);
  }

  PackedMatrix matrix() { return packed_view(format, n, k, memory.data()); }
  float value(int64_t i, int64_t j) const { return unscaled[at(i * k + j)]; }

 private:
  static size_t at(int64_t i) { return static_cast<size_t>(i); }
  int64_t tile(int64_t i, int64_t j, int64_t width) const {
    return (i / 32 * ceil_div(k, width) + j / width) * 2 + i % 32 / 16;
  }

  void fill_bf16(PackedMatrix view, Values values, Random& random) {
    bf16_t* data = const_cast<bf16_t*>(static_cast<const bf16_t*>(view.data));
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < k; ++j) {
        const bf16_t w =
            f32_to_bf16(values == Values::kReals ? random.real() : static_cast<float>(random.integer(-8, 8)));
        data[tile(i, j, 32) * 512 + j % 32 / 2 * 32 + i % 16 * 2 + j % 2] = w;
        unscaled[at(i * k + j)] = bf16_to_f32(w);
      }
  }

  // Random blocks of a file through the packer, whose result tests/numerics compares with the gguf package.
  void fill_blocks(PackedMatrix view, Values values, Random& random) {
    const int64_t row_bytes = block_row_bytes(format, k);
    std::vector<uint8_t> file(at(n * row_bytes));
    for (uint8_t& byte : file) byte = static_cast<uint8_t>(random.integer(0, 255));
    const auto f16_at = [&](uint8_t* to) {
      const float size =
          values == Values::kReals ? 0.01f + 0.02f * std::fabs(random.real()) : std::ldexp(1.0f, random.integer(-1, 1));
      const f16_t bits = f32_to_f16(random.integer(0, 1) == 0 ? size : -size);
      std::memcpy(to, &bits, 2);
    };
    if (format.kind == Format::kF16) {
      for (int64_t i = 0; i < n * k; ++i) f16_at(&file[at(2 * i)]);
    } else {
      const BlockTypeInfo& type = block_type_info(format.type);
      for (int64_t i = 0; i < n * (k / type.block); ++i) {
        uint8_t* block = &file[at(i * type.block_bytes)];
        if (type.is_e8m0)
          *block = static_cast<uint8_t>(random.integer(126, 129));
        else
          f16_at(block + (format.type == BlockType::kQ6_K ? 208 : 0));
        if (type.has_offset) f16_at(block + 2);
      }
    }
    pack_block_panels(file.data(), row_bytes, view, 0, view.n_panels());
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < k; ++j) unscaled[at(i * k + j)] = packed_unscaled(view, i, j);
  }

  void fill_int8(PackedMatrix view, Values values, Random& random) {
    int8_t* data = const_cast<int8_t*>(static_cast<const int8_t*>(view.data));
    for (int64_t i = 0; i < n; ++i) {
      int32_t sum = 0;
      for (int64_t j = 0; j < k; ++j) {
        const int q = values == Values::kReals ? random.integer(-127, 127) : random.integer(-8, 8);
        data[tile(i, j, 64) * 1024 + j % 64 / 4 * 64 + i % 16 * 4 + j % 4] = static_cast<int8_t>(q);
        unscaled[at(i * k + j)] = static_cast<float>(q);
        sum += q;
      }
      const_cast<float*>(view.int8_scales())[i] = scale[at(i)];
      const_cast<int32_t*>(view.column_sums)[i] = sum;
    }
  }

  void fill_int4(PackedMatrix view, Values values, Random& random) {
    uint8_t* data = const_cast<uint8_t*>(view.panel(0));
    for (int64_t i = 0; i < packed_bytes({Format::kInt8, 0}, n, k) - align_up(n, 32) * 8; ++i)
      if (i < align_up(n, 32) * align_up(k, 64) / 2) data[i] = 0x88;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t g = 0; g < ceil_div(k, format.group); ++g) {
        // 5 significant bits (any_scale: 8): 16 .. 31 times a power of two, of either sign
        const float sign = random.integer(0, 1) == 0 ? 1.0f : -1.0f;
        const int significand = format.any_scale ? random.integer(128, 255) : 8 * random.integer(16, 31);
        const float s = values == Values::kReals ? sign * std::ldexp(static_cast<float>(significand), -11)
                                                 : std::ldexp(sign, random.integer(-1, 1));
        const_cast<bf16_t*>(view.int4_scales(0))[(i / 32 * view.k_groups() + g) * 32 + i % 32] = f32_to_bf16(s);
        for (int64_t j = g * format.group; j < min_i64((g + 1) * format.group, k); ++j) {
          const int q = random.integer(-8, 7);
          uint8_t& byte = data[tile(i, j, 64) * 512 + j % 32 / 4 * 64 + i % 16 * 4 + j % 4];
          byte = static_cast<uint8_t>(j % 64 < 32 ? (byte & 0xf0) | (q + 8) : (byte & 0x0f) | (q + 8) << 4);
          unscaled[at(i * k + j)] = static_cast<float>(q) * s;
        }
      }
  }
};

}  // namespace kts::test
