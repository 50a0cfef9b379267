// What every kernel may take for granted. Compiled without ISA flags; in a release there is nothing of it.
#include "kts/kernel.h"

#if KTS_HAS_CONTRACTS

namespace kts {

void check_row_pointers(const void* const* rows, int64_t count, int64_t alignment) {
  KTS_DCHECK(is_array(rows, count));
  for (int64_t i = 0; i < count; ++i) KTS_DCHECK(rows[i] != nullptr && is_aligned(rows[i], alignment));
}

void check_weights(const PackedMatrix& w) {
  KTS_DCHECK(w.n > 0 && w.k > 0);
  KTS_DCHECK(w.data != nullptr && is_aligned(w.data, 64));
  const bool has_scales = w.format.kind != Format::kBf16 && w.format.kind != Format::kF16;
  KTS_DCHECK((w.scales != nullptr) == has_scales);
  KTS_DCHECK(w.panel_stride_bytes > 0 && w.panel_stride_bytes % 64 == 0 && (!has_scales || w.scale_stride_bytes > 0));
  if (w.format.kind == Format::kInt8) {
    KTS_DCHECK(is_aligned(w.scales, 64) && w.column_sums != nullptr && is_aligned(w.column_sums, 64));
  } else if (w.format.kind == Format::kInt4) {
    KTS_DCHECK(w.format.group == 32 || w.format.group == 64 || w.format.group == 128);
    KTS_DCHECK(is_aligned(w.scales, 64));
  } else if (is_block_format(w.format.kind)) {
    KTS_DCHECK(w.format.type != BlockType::kNone);
    const BlockTypeInfo& type = block_type_info(w.format.type);
    KTS_DCHECK(type.bits == block_bits(w.format.kind));
    KTS_DCHECK(w.k % type.block == 0);
  }
}

// int8 rows are read to the end of a tile.
static void check_int8_rows(const GemmTask& task) {
  check_rows(task.q_rows, task.m);
  KTS_DCHECK(is_array(task.q_scales, task.m));
  for (int64_t i = 0; i < task.m; ++i)
    for (int64_t j = task.w->k; j < align_up(task.w->k, kTileKQ); ++j)
      KTS_DCHECK(task.q_rows[i][task.a_offset + j] == 0);
}

void check_task(const GemmTask& task, const KernelContract& contract) {
  KTS_DCHECK(task.w != nullptr);
  const PackedMatrix& w = *task.w;
  check_weights(w);
  KTS_DCHECK(w.format.kind == contract.weights);
  KTS_DCHECK(task.m >= 1 && (contract.max_rows == 0 || task.m <= contract.max_rows));
  const int64_t columns = contract.direction == Direction::kForward ? w.n : w.k;
  KTS_DCHECK(0 <= task.panel_begin && task.panel_begin < task.panel_end);
  KTS_DCHECK(task.panel_end <= ceil_div(columns, kPanel));
  KTS_DCHECK(task.panel_end - task.panel_begin <= kMaxTaskPanels);
  KTS_DCHECK(is_array(task.c, task.m) && task.ldc >= (task.panel_end - task.panel_begin) * kPanel);
  KTS_DCHECK(task.scratch != nullptr && is_aligned(task.scratch, 64));
  KTS_DCHECK(task.a_offset >= 0);
  if (contract.rows == Rows::kInt8)
    check_int8_rows(task);
  else
    check_rows(task.a_rows, task.m);
  const bool may_accumulate = contract.direction == Direction::kInputGrad || contract.weights == Format::kBf16;
  KTS_DCHECK(!task.accumulate || may_accumulate);
}

}  // namespace kts

#endif
