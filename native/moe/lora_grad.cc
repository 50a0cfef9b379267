// Gradients of the LoRA factors, per expert, summed over its rows in ascending order in f32:
//   dA [rank, in] = sum_rows (scale * d(xA^T))^T x      dB [rank, out] = sum_rows (scale * xA^T)^T dy
// Both are the same product: thin f32 coefficients [rows, rank], transposed, times bf16 rows. A task owns a range of
// columns.
#include <cstring>

#include "pass.h"

namespace kts {

namespace {

constexpr int64_t kColumnsPerTask = 512;

struct Factor {
  const float* coefficients;    // [rows, rank]
  const bf16_t* const* q_rows;  // [rows]
  int64_t rank;
  int64_t cols;
  float* grad;  // of expert 0
  int64_t expert_stride;
  int64_t rank_stride;
  int64_t tasks() const { return ceil_div(cols, kColumnsPerTask); }
};

// The wanted factors; returns their number (at most six).
int list_factors(const Pass& pass, const ExpertLoraGrads& grads, Factor* factors) {
  const ExpertLora& lora = pass.lora;
  const int64_t hidden = pass.shape().hidden, inter = pass.shape().inter;
  int count = 0;
  const auto add = [&](const float* coefficients, const bf16_t* const* q_rows, int64_t rank, int64_t cols, float* grad,
                       int64_t expert_stride, int64_t rank_stride) {
    if (grad != nullptr && rank > 0)
      factors[count++] = {coefficients, q_rows, rank, cols, grad, expert_stride, rank_stride};
  };
  add(pass.dxa_gate, pass.xl_rows, lora.gate.rank, hidden, grads.gate.a, grads.gate.a_expert, grads.gate.a_rank);
  if (!lora.shares_a())
    add(pass.dxa_up, pass.xl_rows, lora.up.rank, hidden, grads.up.a, grads.up.a_expert, grads.up.a_rank);
  add(pass.xa_gate, pass.dg_rows, lora.gate.rank, inter, grads.gate.b, grads.gate.b_expert, grads.gate.b_rank);
  add(pass.xa_up, pass.du_rows, lora.up.rank, inter, grads.up.b, grads.up.b_expert, grads.up.b_rank);
  add(pass.dha_weighted, pass.hl_rows, lora.down.rank, inter, grads.down.a, grads.down.a_expert, grads.down.a_rank);
  add(pass.ha, pass.dout_rows, lora.down.rank, hidden, grads.down.b, grads.down.b_expert, grads.down.b_rank);
  return count;
}

void zero_factor(float* grad, int64_t expert, int64_t expert_stride, int64_t rank_stride, int64_t rank, int64_t cols) {
  if (grad == nullptr) return;
  for (int64_t r = 0; r < rank; ++r)
    std::memset(grad + expert * expert_stride + r * rank_stride, 0, static_cast<size_t>(cols) * sizeof(float));
}

}  // namespace

int64_t num_lora_grad_tasks(const Pass& pass, const ExpertLoraGrads& grads) {
  Factor factors[6];
  const int count = list_factors(pass, grads, factors);
  int64_t per_expert = 0;
  for (int f = 0; f < count; ++f) per_expert += factors[f].tasks();
  return per_expert * pass.routing.num_active;
}

void run_lora_grad_task(const Pass& pass, const ExpertLoraGrads& grads, int64_t task) {
  Factor factors[6];
  const int count = list_factors(pass, grads, factors);
  int64_t expert = pass.routing.active[task % pass.routing.num_active];
  int64_t chunk = task / pass.routing.num_active;
  int f = 0;
  for (; f < count && chunk >= factors[f].tasks(); ++f) chunk -= factors[f].tasks();
  const Factor& factor = factors[f];
  const int64_t col = chunk * kColumnsPerTask, begin = pass.routing.offsets[expert];
  const int64_t rows = pass.routing.offsets[expert + 1] - begin;
  pass.ops->axpy_rows(factor.coefficients + begin * factor.rank, 1, factor.rank, factor.rank, factor.q_rows + begin,
                      col, rows, factor.grad + expert * factor.expert_stride + col, factor.rank_stride,
                      min_i64(kColumnsPerTask, factor.cols - col));
}

void zero_lora_grads(const MoeShape& shape, const ExpertLora& lora, const ExpertLoraGrads& grads, ThreadPool& pool) {
  pool.parallel_for(shape.num_experts, [&](int64_t e, int) {
    const auto zero = [&](const LoraGradView& grad, int64_t rank, int64_t in, int64_t out) {
      zero_factor(grad.a, e, grad.a_expert, grad.a_rank, rank, in);
      zero_factor(grad.b, e, grad.b_expert, grad.b_rank, rank, out);
    };
    zero(grads.gate, lora.gate.rank, shape.hidden, shape.inter);
    zero(grads.up, lora.up.rank, shape.hidden, shape.inter);
    zero(grads.down, lora.down.rank, shape.inter, shape.hidden);
  });
}

}  // namespace kts
