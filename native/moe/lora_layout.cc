#include "kts/lora_layout.h"

#include "kts/base.h"
#include "kts/tables.h"
#include "kts/thread_pool.h"

namespace kts {

namespace {
constexpr int64_t kTaskDims = 16;  // a cache line of the operand; the stored rows are read from end to end
}  // namespace

void operand_from_expert_minor(const LoraLayout& layout, const float* stored, float* operand) {
  const int64_t width = layout.rank * layout.num_experts, expert_stride = layout.rank * layout.dim;
  Runtime& rt = runtime();
  const std::lock_guard<std::mutex> lock(rt.mutex);
  const RowOps& ops = row_ops(active_isa());
  rt.pool->parallel_for(ceil_div(layout.dim, kTaskDims), [&](int64_t task, int) {
    const int64_t dim = task * kTaskDims, count = min_i64(kTaskDims, layout.dim - dim);
    for (int64_t r = 0; r < layout.rank; ++r)
      ops.transpose(stored + dim * width + r * layout.num_experts, width, count, layout.num_experts,
                    operand + r * layout.dim + dim, expert_stride);
  });
}

}  // namespace kts
