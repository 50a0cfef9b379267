#include "kts/lora_layout.h"

#include "kts/base.h"
#include "kts/thread_pool.h"

namespace kts {

namespace {

constexpr int64_t kBlock = 16;      // 16 floats are a cache line
constexpr int64_t kTaskDims = 128;  // of one rank row

// to[j, i] = from[i, j], i < rows, j < cols
void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t cols, float* to, int64_t to_stride) {
  for (int64_t i0 = 0; i0 < rows; i0 += kBlock)
    for (int64_t j0 = 0; j0 < cols; j0 += kBlock)
      for (int64_t j = j0; j < min_i64(j0 + kBlock, cols); ++j)
        for (int64_t i = i0; i < min_i64(i0 + kBlock, rows); ++i) to[j * to_stride + i] = from[i * from_stride + j];
}

// Calls fn(rank row, first dim, number of dims) in parallel.
template <class Fn>
void for_pieces(const LoraLayout& layout, Fn&& fn) {
  Runtime& rt = runtime();
  const std::lock_guard<std::mutex> lock(rt.mutex);
  const int64_t pieces = ceil_div(layout.dim, kTaskDims);
  rt.pool->parallel_for(layout.rank * pieces, [&](int64_t task, int) {
    const int64_t dim = task % pieces * kTaskDims;
    fn(task / pieces, dim, min_i64(kTaskDims, layout.dim - dim));
  });
}

}  // namespace

void operand_from_expert_minor(const LoraLayout& layout, const float* stored, float* operand) {
  const int64_t width = layout.rank * layout.num_experts, expert_stride = layout.rank * layout.dim;
  for_pieces(layout, [&](int64_t r, int64_t dim, int64_t count) {
    transpose(stored + dim * width + r * layout.num_experts, width, count, layout.num_experts,
              operand + r * layout.dim + dim, expert_stride);
  });
}

void gradient_to_expert_minor(const LoraLayout& layout, const float* gradient, float* stored) {
  const int64_t width = layout.rank * layout.num_experts, expert_stride = layout.rank * layout.dim;
  for_pieces(layout, [&](int64_t r, int64_t dim, int64_t count) {
    transpose(gradient + r * layout.dim + dim, expert_stride, layout.num_experts, count,
              stored + dim * width + r * layout.num_experts, width);
  });
}

}  // namespace kts
