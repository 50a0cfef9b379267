// Packed weight matrices and the two products made from ONE packed copy.
//
// W [n, k] row-major (a torch Linear weight: n outputs, k inputs) is packed into tiles of 16 n x 32 k bf16:
//   tile    = (n / 32 * k_tiles + k / 32) * 2 + n % 32 / 16
//   element = tile * 512 + (k % 32 / 2) * 32 + n % 16 * 2 + k % 2
// with k_tiles = ceil(k / 32) and zeros beyond n and k. So a panel of 32 n is one contiguous stream along k, and a
// fixed k tile of consecutive panels is read in pieces of 2 KiB by the input gradient.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "kts/base.h"
#include "kts/isa.h"
#include "kts/types.h"

namespace kts {

enum class Format : int { kBf16 = 0 };
enum class Direction : int { kForward = 0, kInputGrad = 1 };

inline constexpr int kTileN = 16;
inline constexpr int kTileK = 32;
inline constexpr int kPanel = 32;  // columns of both directions come in panels of this width
inline constexpr int kTileElements = kTileN * kTileK;

// A view of packed weights; the memory belongs to the layer. layout as above.
struct PackedMatrix {
  Format format = Format::kBf16;
  int64_t n = 0;
  int64_t k = 0;
  const void* data = nullptr;

  int64_t n_panels() const { return ceil_div(n, kPanel); }
  int64_t k_panels() const { return ceil_div(k, kTileK); }
};

int64_t packed_bytes(Format format, int64_t n, int64_t k);

// Packs panels [panel_begin, panel_end) of w [n, k] (row stride in elements) into `packed`. Panels are independent.
void pack_panels(const bf16_t* w, int64_t stride, int64_t n, int64_t k, int64_t panel_begin, int64_t panel_end,
                 void* packed);

// The inverse: writes rows of w [n, k] that belong to the given panels.
void unpack_panels(const PackedMatrix& packed, int64_t panel_begin, int64_t panel_end, bf16_t* w, int64_t stride);

// One task of a product, for a range of column panels.
//   kForward:    c[m, cols] (+)= a[m, k] W^T  columns are n, the sum runs over k
//   kInputGrad:  c[m, cols] (+)= a[m, n] W    columns are k, the sum runs over n
// a: one pointer per row, bf16, of which exactly k (n) elements are read. c: f32, cols = 32 * (panel_end - panel_begin)
// columns, row stride ldc >= cols; columns beyond the matrix get zeros. Every sum runs in ascending order in f32 with
// fused multiply-adds, whatever m and the range are: results do not depend on how the work is split.
struct GemmTask {
  const bf16_t* const* a_rows = nullptr;
  int64_t m = 0;
  const PackedMatrix* w = nullptr;
  int64_t panel_begin = 0;
  int64_t panel_end = 0;
  float* c = nullptr;
  int64_t ldc = 0;
  bool accumulate = false;
  float* scratch = nullptr;  // gemm_scratch_floats() floats, 64-byte aligned, one per thread
};

using GemmFn = void (*)(const GemmTask&);

// One row of gemm/kernels.inc.
struct KernelRow {
  const char* name;
  Isa isa;
  Format format;
  Direction direction;
  int block_m;
  int block_n;
  double macs_per_cycle;  // for the cost estimate, one core
  GemmFn run;
};

const std::vector<KernelRow>& kernel_table();

// The row with the least estimated cost among those that `isa` can run.
const KernelRow& select_gemm(Format format, Direction direction, int64_t m, IsaSet isa);

// The widest column range that one task may have, in panels, and the scratch floats that suffice for it.
inline constexpr int64_t kMaxTaskPanels = 4;
inline constexpr int64_t kReduceBlock = 256;            // elements of the sum that one pass over the accumulators takes
inline constexpr int64_t kAStride = kReduceBlock + 16;  // floats; off a power of two, so rows do not share cache sets
inline constexpr int64_t kMaxBlockM = 12;
inline constexpr int64_t gemm_scratch_floats() {
  return kMaxBlockM * kAStride + kMaxTaskPanels * kReduceBlock * kPanel;
}

// Selects a kernel and runs it.
void gemm(Direction direction, const GemmTask& task);

}  // namespace kts
