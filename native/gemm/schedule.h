// How the work of one phase is cut into tasks.
#pragma once
#include <cstdint>

#include "kts/kernel.h"

namespace kts {

// Rows of one expert that a task takes at a time: a multiple of every block_m, and few enough for the sums of a task
// (kRowBlock x 128 f32) to stay in the second-level cache.
inline constexpr int64_t kRowBlock = 192;

// Panels per task so that `panels` of each of `groups` groups give at least four tasks per thread where that is
// possible. Wider tasks amortise the widening of the other operand. The results never depend on it.
int64_t panels_per_task(int64_t panels, int64_t groups, int threads);

// The columns of one task of a phase whose columns are cut into groups of `width` panels.
struct ColumnRange {
  int64_t panel_begin, panel_end;
  int64_t col, cols;    // first column and number of columns of the matrix
  int64_t padded_cols;  // whole panels
};
ColumnRange column_range(int64_t group, int64_t width, int64_t columns);

}  // namespace kts
