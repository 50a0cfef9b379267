// Forward of the routed experts, for the rows x of one expert. s = LoRA scale / (1 - p), m and m' = dropout masks.
//   g = x Wg^T + s (m x Ag^T) Bg^T        u likewise; g and u rounded to bf16 once
//   h = act(g) u                          rounded to bf16
//   y = h Wd^T + s (m' h Ad^T) Bd^T       f32
//   out[token] = sum over its experts of weight * y, rounded once
#include <cstring>

#include "../gemm/schedule.h"
#include "pass.h"

namespace kts {

void project_x_to_rank(Pass& pass, const RowBlock& block) {
  const MoeShape& shape = pass.shape();
  if (pass.x_dropped != nullptr)
    for (int64_t row = block.begin; row < block.end; ++row)
      pass.ops->mask_bf16(pass.mask(DropoutStream::kHidden, row), 0, pass.x_rows[row], shape.hidden,
                          pass.x_dropped + row * shape.hidden);
  const auto project = [&](const LoraView& view, float* xa) {
    float* to = xa + block.begin * view.rank;
    pass.ops->dot_rows(pass.xl_rows + block.begin, block.rows(), view.a + block.expert * view.a_expert, view.a_rank,
                       view.rank, shape.hidden, to, view.rank, false);
    round_and_scale(to, block.rows() * view.rank, pass.scale_of(view));
  };
  if (pass.lora.gate.present()) project(pass.lora.gate, pass.xa_gate);
  if (pass.lora.up.present() && !pass.lora.shares_a()) project(pass.lora.up, pass.xa_up);
}

void project_h_to_rank(Pass& pass, const RowBlock& block) {
  const LoraView& view = pass.lora.down;
  float* to = pass.ha + block.begin * view.rank;
  pass.ops->dot_rows(pass.hl_rows + block.begin, block.rows(), view.a + block.expert * view.a_expert, view.a_rank,
                     view.rank, pass.shape().inter, to, view.rank, false);
  round_and_scale(to, block.rows() * view.rank, pass.scale_of(view));
}

void add_lora(const Pass& pass, const float* xa, const LoraView& lora, const RowBlock& block, int64_t col, int64_t cols,
              float* sum, int64_t ldc) {
  const bf16_t* rows[kMaxRank];
  rank_rows(lora.b + block.expert * lora.b_expert, lora.b_rank, lora.rank, rows);
  pass.ops->axpy_rows(xa + block.begin * lora.rank, lora.rank, 1, block.rows(), rows, col, lora.rank, sum, ldc, cols);
}

namespace {

void gate_up_task(Pass& pass, const RowBlock& block, const ColumnRange& range, const ThreadScratch& scratch) {
  const MoeShape& shape = pass.shape();
  const int64_t ldc = range.padded_cols, stride = shape.inter_stride();
  const PackedMatrix gate = pass.layer->gate(block.expert), up = pass.layer->up(block.expert);
  GemmTask task{pass.x_rows + block.begin,
                block.rows(),
                &gate,
                range.panel_begin,
                range.panel_end,
                scratch.sum0,
                ldc,
                false,
                scratch.gemm};
  gemm(Direction::kForward, task);
  task.w = &up;
  task.c = scratch.sum1;
  gemm(Direction::kForward, task);
  if (pass.lora.gate.present())
    add_lora(pass, pass.xa_gate, pass.lora.gate, block, range.col, range.cols, scratch.sum0, ldc);
  if (pass.lora.up.present()) add_lora(pass, pass.xa_up, pass.lora.up, block, range.col, range.cols, scratch.sum1, ldc);

  const GluOps& glu = pass.ops->glu[static_cast<int>(shape.activation)];
  for (int64_t i = 0; i < block.rows(); ++i) {
    const int64_t row = block.begin + i, at = row * stride + range.col;
    bf16_t* g = pass.tape.retained() ? pass.tape.g + at : nullptr;
    bf16_t* u = pass.tape.retained() ? pass.tape.u + at : nullptr;
    glu.forward(scratch.sum0 + i * ldc, scratch.sum1 + i * ldc, range.cols, g, u, pass.h + at);
    if (pass.h_dropped != nullptr)
      pass.ops->mask_bf16(pass.mask(DropoutStream::kInter, row), range.col, pass.h + at, range.cols,
                          pass.h_dropped + at);
  }
}

void down_task(Pass& pass, const ColumnRange& range, const ThreadScratch& scratch, const MoeOutput& out) {
  const int64_t ldc = range.padded_cols;
  std::memset(scratch.tokens, 0, static_cast<size_t>(pass.input.tokens * ldc) * sizeof(float));
  for (int64_t b = 0; b < pass.num_blocks; ++b) {
    const RowBlock& block = pass.blocks[b];
    const PackedMatrix down = pass.layer->down(block.expert);
    gemm(Direction::kForward, {pass.h_rows + block.begin, block.rows(), &down, range.panel_begin, range.panel_end,
                               scratch.sum0, ldc, false, scratch.gemm});
    if (pass.lora.down.present())
      add_lora(pass, pass.ha, pass.lora.down, block, range.col, range.cols, scratch.sum0, ldc);
    scatter_rows(pass, block, true, scratch.sum0, ldc, range.cols, scratch.tokens, ldc);
  }
  store_tokens(pass, scratch.tokens, ldc, range.col, range.cols, out);
}

}  // namespace

void run_gate_up(Pass& pass) {
  const int64_t inter = pass.shape().inter, panels = ceil_div(inter, kPanel);
  const int64_t width = panels_per_task(panels, pass.num_blocks, pass.pool->threads());
  const int64_t groups = ceil_div(panels, width);
  pass.pool->parallel_for(pass.num_blocks * groups, [&](int64_t task, int thread) {
    gate_up_task(pass, pass.blocks[task / groups], column_range(task % groups, width, inter), pass.scratch[thread]);
  });
}

void run_forward(Pass& pass, const MoeOutput& out) {
  if (pass.lora.gate.present() || pass.lora.up.present() || pass.x_dropped != nullptr)
    pass.pool->parallel_for(pass.num_blocks, [&](int64_t task, int) { project_x_to_rank(pass, pass.blocks[task]); });
  run_gate_up(pass);
  if (pass.lora.down.present())
    pass.pool->parallel_for(pass.num_blocks, [&](int64_t task, int) { project_h_to_rank(pass, pass.blocks[task]); });

  const int64_t hidden = pass.shape().hidden, panels = ceil_div(hidden, kPanel);
  const int64_t width = panels_per_task(panels, 1, pass.pool->threads());
  pass.pool->parallel_for(ceil_div(panels, width), [&](int64_t task, int thread) {
    down_task(pass, column_range(task, width, hidden), pass.scratch[thread], out);
  });
}

}  // namespace kts
