// Gradients of the LoRA factors, per expert, summed over its rows in ascending order in f32:
//   dA [rank, in] = sum_rows (scale * d(xA^T))^T x      dB [rank, out] = sum_rows (scale * xA^T)^T dy
// Both are the same product: thin f32 coefficients [rows, rank], transposed, times bf16 rows. A task owns a range of
// columns: of one expert, or of all experts where the expert index is the fastest one in memory. There it computes
// [rank, expert, columns] in its scratch and transposes that, so memory is written once and by whole cache lines.
#include <cstring>

#include "pass.h"

namespace kts {

namespace {

constexpr int64_t kColumnsPerTask = 512;
constexpr int64_t kMinorColumns = 32;        // of all experts: a cache line of a bf16 row
constexpr int64_t kMinorFloats = 64 * 1024;  // half of a second-level cache of 512 KiB

struct Factor {
  const float* coefficients;    // [rows, rank]
  const bf16_t* const* q_rows;  // [rows]
  int64_t rank;
  int64_t cols;
  FactorGrad grad;

  // Ranks that one expert-minor task takes.
  int64_t minor_ranks(int64_t num_experts) const {
    return min_i64(rank, expert_minor_floats(num_experts) / (num_experts * kMinorColumns));
  }
  int64_t tasks(const Pass& pass) const {
    if (!grad.expert_minor()) return ceil_div(cols, kColumnsPerTask) * pass.routing.num_active;
    return ceil_div(cols, kMinorColumns) * ceil_div(rank, minor_ranks(pass.shape().num_experts));
  }
};

// The wanted factors; returns their number (at most six).
int list_factors(const Pass& pass, const ExpertLoraGrads& grads, Factor* factors) {
  const ExpertLora& lora = pass.lora;
  const int64_t hidden = pass.shape().hidden, inter = pass.shape().inter;
  int count = 0;
  const auto add = [&](const float* coefficients, const bf16_t* const* q_rows, int64_t rank, int64_t cols,
                       const FactorGrad& grad) {
    if (grad.data != nullptr && rank > 0) factors[count++] = {coefficients, q_rows, rank, cols, grad};
  };
  add(pass.dxa_gate, pass.xl_rows, lora.gate.rank, hidden, grads.gate.a);
  if (!lora.shares_a()) add(pass.dxa_up, pass.xl_rows, lora.up.rank, hidden, grads.up.a);
  add(pass.xa_gate, pass.dg_rows, lora.gate.rank, inter, grads.gate.b);
  add(pass.xa_up, pass.du_rows, lora.up.rank, inter, grads.up.b);
  add(pass.dha_weighted, pass.hl_rows, lora.down.rank, inter, grads.down.a);
  add(pass.ha, pass.dout_rows, lora.down.rank, hidden, grads.down.b);
  return count;
}

// Columns [col, col + cols) and ranks [first, first + ranks) of one expert; c [ranks, cols].
void expert_columns(const Pass& pass, const Factor& factor, int64_t expert, int64_t first, int64_t ranks, int64_t col,
                    int64_t cols, float* c, int64_t ldc) {
  const int64_t begin = pass.routing.offsets[expert], rows = pass.routing.offsets[expert + 1] - begin;
  pass.ops->axpy_rows(factor.coefficients + begin * factor.rank + first, 1, factor.rank, ranks, factor.q_rows + begin,
                      col, rows, c, ldc, cols, pass.adds_lora_grads);
}

void expert_major_task(const Pass& pass, const Factor& factor, int64_t task) {
  const int64_t expert = pass.routing.active[task % pass.routing.num_active];
  const int64_t col = task / pass.routing.num_active * kColumnsPerTask;
  expert_columns(pass, factor, expert, 0, factor.rank, col, min_i64(kColumnsPerTask, factor.cols - col),
                 factor.grad.data + expert * factor.grad.expert + col, factor.grad.rank);
}

void expert_minor_task(const Pass& pass, const Factor& factor, int64_t task, float* scratch) {
  const int64_t experts = pass.shape().num_experts, pieces = ceil_div(factor.cols, kMinorColumns);
  const int64_t most = factor.minor_ranks(experts), first = task / pieces * most;
  const int64_t ranks = min_i64(most, factor.rank - first);
  const int64_t col = task % pieces * kMinorColumns, cols = min_i64(kMinorColumns, factor.cols - col);
  const int64_t stride = experts * kMinorColumns;  // of a rank in scratch
  float* to = factor.grad.data + first * factor.grad.rank + col * factor.grad.dim;
  if (pass.adds_lora_grads) pass.ops->transpose(to, factor.grad.dim, cols, ranks * experts, scratch, kMinorColumns);
  for (int64_t e = 0; e < experts; ++e) {
    float* c = scratch + e * kMinorColumns;
    if (pass.routing.offsets[e] < pass.routing.offsets[e + 1]) {
      expert_columns(pass, factor, e, first, ranks, col, cols, c, stride);
    } else if (!pass.adds_lora_grads) {
      for (int64_t r = 0; r < ranks; ++r) std::memset(c + r * stride, 0, static_cast<size_t>(cols) * sizeof(float));
    }
  }
  pass.ops->transpose(scratch, kMinorColumns, ranks * experts, cols, to, factor.grad.dim);
}

void zero_factor(const FactorGrad& grad, int64_t expert, int64_t rank, int64_t cols) {
  for (int64_t r = 0; r < rank; ++r)
    std::memset(grad.data + expert * grad.expert + r * grad.rank, 0, static_cast<size_t>(cols) * sizeof(float));
}

}  // namespace

int64_t expert_minor_floats(int64_t num_experts) {
  const int64_t one_rank = num_experts * kMinorColumns;
  return one_rank > kMinorFloats ? one_rank : kMinorFloats;
}

int64_t num_lora_grad_tasks(const Pass& pass, const ExpertLoraGrads& grads) {
  Factor factors[6];
  const int count = list_factors(pass, grads, factors);
  int64_t tasks = 0;
  for (int f = 0; f < count; ++f) tasks += factors[f].tasks(pass);
  return tasks;
}

void run_lora_grad_task(const Pass& pass, const ExpertLoraGrads& grads, int64_t task, const ThreadScratch& scratch) {
  Factor factors[6];
  const int count = list_factors(pass, grads, factors);
  int f = 0;
  for (; f < count && task >= factors[f].tasks(pass); ++f) task -= factors[f].tasks(pass);
  const Factor& factor = factors[f];
  factor.grad.expert_minor() ? expert_minor_task(pass, factor, task, scratch.experts)
                             : expert_major_task(pass, factor, task);
}

void zero_lora_grads(const ExpertShape& shape, const ExpertLora& lora, const ExpertLoraGrads& grads,
                     const Routing* routing, ThreadPool& pool) {
  const auto zero = [&](const FactorGrad& grad, int64_t expert, int64_t rank, int64_t cols) {
    if (grad.data == nullptr) return;
    if (!grad.expert_minor()) return zero_factor(grad, expert, rank, cols);
    for (int64_t i = 0; routing == nullptr && expert == 0 && i < cols; ++i)
      std::memset(grad.data + i * grad.dim, 0, static_cast<size_t>(rank * shape.num_experts) * sizeof(float));
  };
  pool.parallel_for(shape.num_experts, [&](int64_t e, int) {
    if (routing != nullptr && routing->offsets[e] < routing->offsets[e + 1]) return;
    zero(grads.gate.a, e, lora.gate.rank, shape.hidden);
    zero(grads.gate.b, e, lora.gate.rank, shape.inter);
    zero(grads.up.a, e, lora.up.rank, shape.hidden);
    zero(grads.up.b, e, lora.up.rank, shape.inter);
    zero(grads.down.a, e, lora.down.rank, shape.inter);
    zero(grads.down.b, e, lora.down.rank, shape.hidden);
  });
}

}  // namespace kts
