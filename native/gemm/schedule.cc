#include "schedule.h"

namespace kts {

int64_t panels_per_task(int64_t panels, int64_t groups, int threads) {
  KTS_DCHECK(panels >= 0 && groups >= 0 && threads >= 1);
  int64_t width = kMaxTaskPanels;
  while (width > 1 && ceil_div(panels, width) * groups < 4 * static_cast<int64_t>(threads)) width /= 2;
  return width;
}

ColumnRange column_range(int64_t group, int64_t width, int64_t columns) {
  KTS_DCHECK(group >= 0 && width >= 1 && width <= kMaxTaskPanels && group * width * kPanel < columns);
  const int64_t begin = group * width, end = min_i64(begin + width, ceil_div(columns, kPanel));
  return {begin, end, begin * kPanel, min_i64(end * kPanel, columns) - begin * kPanel, (end - begin) * kPanel};
}

}  // namespace kts
