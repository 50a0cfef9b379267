// Row-major bf16 -> tile order (formulas in kts/packed.h) and back.
#include <cstring>

#include "kts/kernel.h"
#include "kts/pack.h"
#include "kts/tables.h"

namespace kts {

namespace {

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
  for (int64_t kt = 0; kt < packed.k_panels(); ++kt)
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t row = panel * kPanel + half * kTileN, col = kt * kTileK;
      const int64_t rows = row < packed.n ? min_i64(kTileN, packed.n - row) : 0;
      pack_bf16_tile(rows > 0 ? w + row * stride + col : nullptr, stride, rows, min_i64(kTileK, packed.k - col),
                     writable<bf16_t>(packed.panel(panel)) + (kt * 2 + half) * kTileElements);
    }
}

// Quantised weights go through blocks of one row on the stack: whole tiles and whole groups.
constexpr int64_t kBlockK = 1024;

// Bytes of tile t (along k) of the panel and half that row n belongs to, at the dword of that row.
uint8_t* tile_of_row(const PackedMatrix& packed, int64_t n, int64_t t, int64_t tile_bytes) {
  const int64_t tile = t * 2 + n % kPanel / kTileN;
  return writable<uint8_t>(packed.panel(n / kPanel)) + tile * tile_bytes + n % kTileN * 4;
}

// Dwords of a row <-> rows of 64 bytes of a tile.
void scatter_dwords(const uint8_t* from, int64_t dwords, uint8_t* tile) {
  for (int64_t i = 0; i < dwords; ++i) std::memcpy(tile + i * 64, from + i * 4, 4);
}
void gather_dwords(const uint8_t* tile, int64_t dwords, uint8_t* to) {
  for (int64_t i = 0; i < dwords; ++i) std::memcpy(to + i * 4, tile + i * 64, 4);
}

// The scale is that of the whole row of which w is the part from `before` on.
void pack_int8_row(const bf16_t* w, const RowPart& part, const PackedMatrix& packed, int64_t n) {
  const QuantOps& ops = quant_ops(active_isa());
  const uint32_t largest = ops.largest(w - part.before, part.before + packed.k + part.after);
  KTS_CHECK(largest < 0x7f80u, "weights: expected finite numbers, found NaN or infinity");
  const Int8Scale scale = int8_scale(largest);
  int32_t sum = 0;
  for (int64_t k = 0; k < packed.k; k += kBlockK) {
    const int64_t count = min_i64(kBlockK, packed.k - k), padded = align_up(count, kTileKQ);
    alignas(64) int8_t q[kBlockK];
    ops.round_int8(w + k, count, scale.inverse, q);
    std::memset(q + count, 0, static_cast<size_t>(padded - count));
    for (int64_t i = 0; i < padded; ++i) sum += q[i];
    for (int64_t i = 0; i < padded; i += kTileKQ)
      scatter_dwords(reinterpret_cast<const uint8_t*>(q + i), kTileKQ / 4,
                     tile_of_row(packed, n, (k + i) / kTileKQ, kTileBytes));
  }
  writable<float>(packed.scales)[n] = scale.scale;
  const_cast<int32_t*>(packed.column_sums)[n] = sum;
}

void pack_int8_panel(const bf16_t* w, int64_t stride, const RowPart& part, const PackedMatrix& packed, int64_t panel) {
  const int64_t begin = panel * kPanel, end = min_i64(begin + kPanel, packed.n);
  if (end < begin + kPanel) {
    std::memset(writable<char>(packed.panel(panel)), 0,
                static_cast<size_t>(panel_value_bytes(packed.format, packed.k)));
    for (int64_t n = end; n < begin + kPanel; ++n)
      writable<float>(packed.scales)[n] = 0.0f, const_cast<int32_t*>(packed.column_sums)[n] = 0;
  }
  for (int64_t n = begin; n < end; ++n) pack_int8_row(w + n * stride, part, packed, n);
}

void pack_int4_row(const bf16_t* w, const PackedMatrix& packed, int64_t n) {
  const int64_t group = packed.format.group;
  bf16_t* scales = writable<bf16_t>(packed.panel_scales(n / kPanel)) + n % kPanel;
  for (int64_t k = 0; k < packed.k; k += kBlockK) {
    const int64_t count = min_i64(kBlockK, packed.k - k), padded = align_up(count, kTileKQ);
    alignas(64) int8_t q[kBlockK];
    for (int64_t i = 0; i < count; i += group)
      scales[(k + i) / group * kPanel] = f32_to_bf16(quantize_group_int4(w + k + i, min_i64(group, count - i), q + i));
    std::memset(q + count, 0, static_cast<size_t>(padded - count));
    for (int64_t i = 0; i < padded; i += kTileKQ) {
      uint8_t pairs[kPanel];
      for (int64_t j = 0; j < kPanel; ++j)
        pairs[j] = static_cast<uint8_t>((q[i + j] + 8) | (q[i + kPanel + j] + 8) << 4);
      scatter_dwords(pairs, kPanel / 4, tile_of_row(packed, n, (k + i) / kTileKQ, kTileBytesInt4));
    }
  }
}

// A panel that the matrix does not fill holds zeros beyond it.
void clear_int4_panel(const PackedMatrix& packed, int64_t panel) {
  if ((panel + 1) * kPanel <= packed.n) return;
  const int64_t values = panel_value_bytes(packed.format, packed.k),
                scales = panel_scale_bytes(packed.format, packed.k);
  std::memset(writable<uint8_t>(packed.panel(panel)), 0x88, static_cast<size_t>(values));
  std::memset(writable<uint8_t>(packed.panel_scales(panel)), 0, static_cast<size_t>(scales));
}

void pack_int4_panel(const bf16_t* w, int64_t stride, const PackedMatrix& packed, int64_t panel) {
  clear_int4_panel(packed, panel);
  for (int64_t n = panel * kPanel; n < min_i64((panel + 1) * kPanel, packed.n); ++n)
    pack_int4_row(w + n * stride, packed, n);
}

void pack_stored_row(const uint8_t* q, const bf16_t* from, const PackedMatrix& packed, int64_t n) {
  const int64_t groups = packed.k_groups();
  bf16_t* scales = writable<bf16_t>(packed.panel_scales(n / kPanel)) + n % kPanel;
  for (int64_t g = 0; g < groups; ++g) {
    KTS_CHECK((from[g] & 0x7f80) != 0x7f80, "scales: expected finite numbers, found NaN or infinity");
    scales[g * kPanel] = from[g];
  }
  for (int64_t k = 0; k < packed.k; k += kTileKQ) {
    uint8_t pairs[kPanel];
    for (int64_t j = 0; j < kPanel; ++j) {
      const int64_t low = k + j, high = low + kPanel;
      const int first = low < packed.k ? q[low / 2] >> (low % 2 * 4) & 15 : 8;
      const int second = high < packed.k ? q[high / 2] >> (high % 2 * 4) & 15 : 8;
      pairs[j] = static_cast<uint8_t>(first | second << 4);
    }
    scatter_dwords(pairs, kPanel / 4, tile_of_row(packed, n, k / kTileKQ, kTileBytesInt4));
  }
}

void store_value(bf16_t* to, float value) { *to = f32_to_bf16(value); }
void store_value(float* to, float value) { *to = value; }

// The bits, so that NaN keep theirs.
void store_bits(bf16_t* to, bf16_t bits) { *to = bits; }
void store_bits(float* to, bf16_t bits) { *to = bf16_to_f32(bits); }

template <class T>
void unpack_bf16_row(const PackedMatrix& packed, int64_t n, T* w) {
  for (int64_t k = 0; k < packed.k; k += kTileK) {
    const int64_t tile = k / kTileK * 2 + n % kPanel / kTileN;
    bf16_t bits[kTileK];
    gather_dwords(packed.panel(n / kPanel) + tile * kTileBytes + n % kTileN * 4, kTileK / 2,
                  reinterpret_cast<uint8_t*>(bits));
    for (int64_t i = 0; i < min_i64(kTileK, packed.k - k); ++i) store_bits(w + k + i, bits[i]);
  }
}

template <class T>
void unpack_integer_row(const PackedMatrix& packed, int64_t n, T* w) {
  const bool is_int8 = packed.format.kind == Format::kInt8;
  for (int64_t k = 0; k < packed.k; k += kTileKQ) {
    int8_t q[kTileKQ];
    if (is_int8) {
      gather_dwords(tile_of_row(packed, n, k / kTileKQ, kTileBytes), kTileKQ / 4, reinterpret_cast<uint8_t*>(q));
    } else {
      uint8_t pairs[kPanel];
      gather_dwords(tile_of_row(packed, n, k / kTileKQ, kTileBytesInt4), kPanel / 4, pairs);
      for (int64_t i = 0; i < kPanel; ++i) {
        q[i] = static_cast<int8_t>((pairs[i] & 15) - 8);
        q[kPanel + i] = static_cast<int8_t>((pairs[i] >> 4) - 8);
      }
    }
    for (int64_t half = k; half < min_i64(k + kTileKQ, packed.k); half += kPanel) {  // within one group
      const float scale = packed_scale(packed, n, half);
      for (int64_t i = half; i < min_i64(half + kPanel, packed.k); ++i) store_value(w + i, scale * q[i - k]);
    }
  }
}

template <class T>
void unpack(const PackedMatrix& packed, int64_t panel_begin, int64_t panel_end, T* w, int64_t stride) {
  KTS_DCHECKED(check_panels(packed, panel_begin, panel_end));
  KTS_DCHECK(is_array(w, packed.n) && stride >= packed.k);
  for (int64_t n = panel_begin * kPanel; n < min_i64(panel_end * kPanel, packed.n); ++n) {
    if (packed.format.kind == Format::kBf16)
      unpack_bf16_row(packed, n, w + n * stride);
    else if (packed.format.kind == Format::kInt8 || packed.format.kind == Format::kInt4)
      unpack_integer_row(packed, n, w + n * stride);
    else
      for (int64_t k = 0; k < packed.k; ++k) store_value(w + n * stride + k, packed_unscaled(packed, n, k));
  }
}

}  // namespace

void pack_panels(const bf16_t* w, int64_t stride, const PackedMatrix& packed, int64_t panel_begin, int64_t panel_end,
                 const RowPart& part) {
  KTS_DCHECKED(check_panels(packed, panel_begin, panel_end));
  KTS_DCHECK(is_array(w, packed.n) && stride >= packed.k && part.before >= 0 && part.after >= 0);
  KTS_CHECK(packed.format.kind <= Format::kInt4, "weights: block types are loaded from blocks, not from bf16");
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    if (packed.format.kind == Format::kBf16) pack_bf16_panel(w, stride, packed, panel);
    if (packed.format.kind == Format::kInt8) pack_int8_panel(w, stride, part, packed, panel);
    if (packed.format.kind == Format::kInt4) pack_int4_panel(w, stride, packed, panel);
  }
}

void pack_stored_int4(const StoredInt4& w, const PackedMatrix& packed, int64_t panel_begin, int64_t panel_end) {
  KTS_DCHECKED(check_panels(packed, panel_begin, panel_end));
  KTS_DCHECK(packed.format.any_scale && packed.k % 2 == 0);
  KTS_DCHECK(is_array(w.q, packed.n) && w.stride >= packed.k / 2);
  KTS_DCHECK(is_array(w.scales, packed.n) && w.scale_stride >= packed.k_groups());
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    clear_int4_panel(packed, panel);
    for (int64_t n = panel * kPanel; n < min_i64((panel + 1) * kPanel, packed.n); ++n)
      pack_stored_row(w.q + n * w.stride, w.scales + n * w.scale_stride, packed, n);
  }
}

void unpack_panels(const PackedMatrix& packed, int64_t panel_begin, int64_t panel_end, bf16_t* w, int64_t stride) {
  unpack(packed, panel_begin, panel_end, w, stride);
}

void unpack_panels(const PackedMatrix& packed, int64_t panel_begin, int64_t panel_end, float* w, int64_t stride) {
  unpack(packed, panel_begin, panel_end, w, stride);
}

}  // namespace kts
