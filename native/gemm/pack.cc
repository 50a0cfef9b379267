// Row-major bf16 -> tile order (formulas in kts/packed.h) and back.
#include <cstring>
#include <string>

#include "kts/packed.h"
#include "kts/quant.h"

namespace kts {

namespace {

int64_t value_bytes(WeightFormat format, int64_t n, int64_t k) {
  const int64_t rows = align_up(n, kPanel);
  if (format.kind == Format::kBf16) return rows * align_up(k, kTileK) * 2;
  return rows * align_up(k, kTileKQ) / (format.kind == Format::kInt8 ? 1 : 2);
}

int64_t scale_bytes(WeightFormat format, int64_t n, int64_t k) {
  const int64_t rows = align_up(n, kPanel);
  if (format.kind == Format::kInt8) return rows * static_cast<int64_t>(sizeof(float));
  if (format.kind == Format::kInt4) return rows * ceil_div(k, format.group) * static_cast<int64_t>(sizeof(bf16_t));
  return 0;
}

int64_t sum_bytes(WeightFormat format, int64_t n) {
  return format.kind == Format::kInt8 ? align_up(n, kPanel) * static_cast<int64_t>(sizeof(int32_t)) : 0;
}

template <class T>
T* writable(const void* memory) {
  return static_cast<T*>(const_cast<void*>(memory));
}

// A dword of a bf16 tile is (k even, k odd) of one n.
void pack_bf16_tile(const bf16_t* w, int64_t stride, int64_t rows, int64_t cols, bf16_t* tile) {
  if (rows < kTileN || cols < kTileK) std::memset(tile, 0, kTileBytes);
  for (int64_t i = 0; i < rows; ++i) {
    const bf16_t* from = w + i * stride;
    bf16_t* to = tile + 2 * i;
    int64_t j = 0;
    for (; j + 2 <= cols; j += 2) std::memcpy(to + j * kTileN, from + j, 2 * sizeof(bf16_t));
    if (j < cols) to[j * kTileN] = from[j];
  }
}

void pack_bf16_panel(const bf16_t* w, int64_t stride, const PackedMatrix& packed, int64_t panel) {
  const int64_t k_tiles = packed.k_panels();
  for (int64_t kt = 0; kt < k_tiles; ++kt)
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t row = panel * kPanel + half * kTileN, col = kt * kTileK;
      const int64_t rows = row < packed.n ? min_i64(kTileN, packed.n - row) : 0;
      pack_bf16_tile(rows > 0 ? w + row * stride + col : nullptr, stride, rows, min_i64(kTileK, packed.k - col),
                     writable<bf16_t>(packed.data) + ((panel * k_tiles + kt) * 2 + half) * kTileElements);
    }
}

void store_int8(const PackedMatrix& packed, int64_t n, int64_t k, int q) {
  const int64_t tile = (n / kPanel * ceil_div(packed.k, kTileKQ) + k / kTileKQ) * 2 + n % kPanel / kTileN;
  writable<int8_t>(packed.data)[tile * kTileBytes + k % kTileKQ / 4 * 64 + n % kTileN * 4 + k % 4] =
      static_cast<int8_t>(q);
}

void pack_int8_panel(const bf16_t* w, int64_t stride, const PackedMatrix& packed, int64_t panel) {
  const int64_t panel_bytes = kPanel * align_up(packed.k, kTileKQ);
  std::memset(writable<char>(packed.data) + panel * panel_bytes, 0, static_cast<size_t>(panel_bytes));
  for (int64_t n = panel * kPanel; n < (panel + 1) * kPanel; ++n) {
    float scale = 0.0f;
    int32_t sum = 0;
    if (n < packed.n) {
      static thread_local std::string row;  // int8 [k]; grows to the widest matrix of the thread
      if (static_cast<int64_t>(row.size()) < packed.k) row.resize(static_cast<size_t>(packed.k));
      int8_t* q = reinterpret_cast<int8_t*>(row.data());
      scale = quantize_row_int8(w + n * stride, packed.k, q);
      for (int64_t k = 0; k < packed.k; ++k) store_int8(packed, n, k, q[k]), sum += q[k];
    }
    writable<float>(packed.scales)[n] = scale;
    const_cast<int32_t*>(packed.column_sums)[n] = sum;
  }
}

void pack_int4_panel(const bf16_t* w, int64_t stride, const PackedMatrix& packed, int64_t panel) {
  const int64_t panel_bytes = kPanel * align_up(packed.k, kTileKQ) / 2, group = packed.format.group;
  uint8_t* values = writable<uint8_t>(packed.data);
  bf16_t* scales = writable<bf16_t>(packed.scales);
  std::memset(values + panel * panel_bytes, 0x88, static_cast<size_t>(panel_bytes));
  std::memset(scales + panel * packed.k_groups() * kPanel, 0, static_cast<size_t>(packed.k_groups() * kPanel * 2));
  for (int64_t n = panel * kPanel; n < min_i64((panel + 1) * kPanel, packed.n); ++n)
    for (int64_t g = 0; g < packed.k_groups(); ++g) {
      int8_t q[128];
      const int64_t count = min_i64(group, packed.k - g * group);
      const float scale = quantize_group_int4(w + n * stride + g * group, count, q);
      scales[(panel * packed.k_groups() + g) * kPanel + n % kPanel] = f32_to_bf16(scale);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t k = g * group + i;
        const int64_t tile = (panel * ceil_div(packed.k, kTileKQ) + k / kTileKQ) * 2 + n % kPanel / kTileN;
        uint8_t& byte = values[tile * kTileBytesInt4 + k % kPanel / 4 * 64 + n % kTileN * 4 + k % 4];
        const uint8_t bits = static_cast<uint8_t>(q[i] + 8);
        byte = k % kTileKQ < kPanel ? static_cast<uint8_t>((byte & 0xf0) | bits)
                                    : static_cast<uint8_t>((byte & 0x0f) | bits << 4);
      }
    }
}

void store_value(bf16_t* to, float value) { *to = f32_to_bf16(value); }
void store_value(float* to, float value) { *to = value; }

template <class T>
void unpack(const PackedMatrix& packed, int64_t panel_begin, int64_t panel_end, T* w, int64_t stride) {
  for (int64_t n = panel_begin * kPanel; n < min_i64(panel_end * kPanel, packed.n); ++n) {
    const float scale = packed.format.kind == Format::kInt8 ? packed.int8_scales()[n] : 1.0f;
    for (int64_t k = 0; k < packed.k; ++k) {
      if (packed.format.kind == Format::kBf16) {  // keeps the bits of NaN
        const int64_t tile = (n / kPanel * packed.k_panels() + k / kTileK) * 2 + n % kPanel / kTileN;
        const bf16_t bits = static_cast<const bf16_t*>(
            packed.data)[tile * kTileElements + k % kTileK / 2 * 32 + n % kTileN * 2 + k % 2];
        if constexpr (sizeof(T) == sizeof(bf16_t)) {
          w[n * stride + k] = bits;
        } else {
          w[n * stride + k] = bf16_to_f32(bits);
        }
      } else {
        store_value(w + n * stride + k, scale * packed_unscaled(packed, n, k));
      }
    }
  }
}

}  // namespace

int64_t packed_bytes(WeightFormat format, int64_t n, int64_t k) {
  return value_bytes(format, n, k) + align_up(scale_bytes(format, n, k), 64) + align_up(sum_bytes(format, n), 64);
}

PackedMatrix packed_view(WeightFormat format, int64_t n, int64_t k, const void* memory) {
  const char* base = static_cast<const char*>(memory);
  PackedMatrix view{format, n, k, base, nullptr, nullptr};
  const char* scales = base + value_bytes(format, n, k);
  if (format.kind != Format::kBf16) view.scales = scales;
  if (format.kind == Format::kInt8)
    view.column_sums = reinterpret_cast<const int32_t*>(scales + align_up(scale_bytes(format, n, k), 64));
  return view;
}

void pack_panels(const bf16_t* w, int64_t stride, const PackedMatrix& packed, int64_t panel_begin, int64_t panel_end) {
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    if (packed.format.kind == Format::kBf16) pack_bf16_panel(w, stride, packed, panel);
    if (packed.format.kind == Format::kInt8) pack_int8_panel(w, stride, packed, panel);
    if (packed.format.kind == Format::kInt4) pack_int4_panel(w, stride, packed, panel);
  }
}

void unpack_panels(const PackedMatrix& packed, int64_t panel_begin, int64_t panel_end, bf16_t* w, int64_t stride) {
  unpack(packed, panel_begin, panel_end, w, stride);
}

void unpack_panels(const PackedMatrix& packed, int64_t panel_begin, int64_t panel_end, float* w, int64_t stride) {
  unpack(packed, panel_begin, panel_end, w, stride);
}

const char* format_name(Format format) {
  return format == Format::kBf16 ? "bf16" : format == Format::kInt8 ? "int8" : "int4";
}

WeightFormat weight_format(const char* name, int group) {
  for (const Format kind : {Format::kBf16, Format::kInt8, Format::kInt4}) {
    if (std::string(name) != format_name(kind)) continue;
    if (kind != Format::kInt4) return {kind, 0};
    KTS_CHECK(group == 32 || group == 64 || group == 128, "int4 group_size: expected 32, 64 or 128");
    return {kind, group};
  }
  fail((std::string("format: expected bf16, int8 or int4, got ") + name).c_str());
}

}  // namespace kts
