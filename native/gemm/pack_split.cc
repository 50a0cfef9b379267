// Parts of packed matrices where they lie, and copies of them. Nothing is rounded: bytes stay or move, and the sums over
// fewer columns of int8 are made anew.
#include <cstring>

#include "kts/pack.h"

namespace kts {

namespace {

char* writable(const void* memory) { return static_cast<char*>(const_cast<void*>(memory)); }

}  // namespace

PackedMatrix packed_part(const PackedMatrix& whole, int64_t n_begin, int64_t n, int64_t k_begin, int64_t k) {
  KTS_DCHECK(n_begin % kPanel == 0 && k_begin % whole.format.k_unit() == 0);
  KTS_DCHECK((n % kPanel == 0 || n_begin + n == whole.n) && n_begin + n <= whole.n);
  KTS_DCHECK((k % whole.format.k_unit() == 0 || k_begin + k == whole.k) && k_begin + k <= whole.k);
  const int64_t panel = n_begin / kPanel;
  // A scale of int8 is of a whole row.
  const int64_t scales = whole.format.kind == Format::kInt8 ? 0 : panel_scale_bytes(whole.format, k_begin);
  PackedMatrix part = whole;
  part.n = n, part.k = k;
  part.data = whole.panel(panel) + panel_value_bytes(whole.format, k_begin);
  if (whole.scales != nullptr) part.scales = whole.panel_scales(panel) + scales;
  part.column_sums = whole.column_sums != nullptr && k == whole.k ? whole.column_sums + n_begin : nullptr;
  return part;
}

void copy_panel(const PackedMatrix& from, const PackedMatrix& to, int64_t panel) {
  KTS_DCHECK(from.format == to.format && from.n == to.n && from.k == to.k);
  std::memcpy(writable(to.panel(panel)), from.panel(panel),
              static_cast<size_t>(panel_value_bytes(from.format, from.k)));
  if (from.scales != nullptr)
    std::memcpy(writable(to.panel_scales(panel)), from.panel_scales(panel),
                static_cast<size_t>(panel_scale_bytes(from.format, from.k)));
}

void sum_columns(const PackedMatrix& w, int64_t panel, int32_t* sums) {
  KTS_DCHECK(w.format.kind == Format::kInt8);
  std::memset(sums, 0, kPanel * sizeof(int32_t));
  const auto* tile = reinterpret_cast<const int8_t*>(w.panel(panel));
  for (int64_t step = 0; step < ceil_div(w.k, kTileKQ); ++step)
    for (int64_t half = 0; half < 2; ++half, tile += kTileBytes)
      for (int64_t byte = 0; byte < kTileBytes; ++byte) sums[half * kTileN + byte % 64 / 4] += tile[byte];
}

}  // namespace kts
