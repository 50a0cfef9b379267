// Forward of the routed experts, for the rows x of one expert. s = LoRA scale / (1 - p), m and m' = dropout masks.
//   g = x Wg^T + s (m x Ag^T) Bg^T + bg   f32; u likewise; the tape keeps both in f16
//   h = act(g) u, or another gate         rounded to bf16 once
//   y = h Wd^T + s (m' h Ad^T) Bd^T + bd  f32
//   out[token] = sum over its experts of weight * y, rounded once
// With int8 rows x (once per token) and h are quantised by row for the products with W; the LoRA branches take the
// unquantised values. With several shards y is the sum of their columns of h.
#include <cstring>

#include "../gemm/schedule.h"
#include "pass.h"

namespace kts {

void project_x_to_rank(Pass& pass, const RowBlock& piece) {
  const ExpertShape& shape = pass.shape();
  if (pass.x_dropped != nullptr)
    for (int64_t row = piece.begin; row < piece.end; ++row)
      pass.ops->mask_bf16(pass.mask(DropoutStream::kHidden, row), 0, pass.x_rows[row], shape.hidden,
                          pass.x_dropped + row * shape.hidden);
  const auto project = [&](const LoraView& view, float* xa, const float* kept) {
    if (pass.is_backward && kept != nullptr) return;  // the forward has done it
    float* to = xa + piece.begin * view.rank;
    pass.ops->dot_rows(pass.xl_rows + piece.begin, piece.rows(), view.a + piece.expert * view.a_expert, view.a_rank,
                       view.rank, shape.hidden, to, view.rank, false);
    scale_values(to, piece.rows() * view.rank, pass.scale_of(view));
  };
  if (pass.lora.gate.present()) project(pass.lora.gate, pass.xa_gate, pass.tape.xa_gate);
  if (pass.lora.up.present() && !pass.lora.shares_a()) project(pass.lora.up, pass.xa_up, pass.tape.xa_up);
}

void quantize_x(Pass& pass) {
  if (pass.x_int8.values == nullptr) return;
  const int64_t hidden = pass.shape().hidden, stride = align_up(hidden, kTileKQ);
  pass.pool->parallel_for(pass.input.tokens, [&](int64_t token, int) {
    pass.token_scales[token] =
        pass.ops->quantize_row(pass.input.x + token * hidden, hidden, pass.x_int8.values + token * stride);
  });
  for (int64_t row = 0; row < pass.routing.num_rows; ++row)
    pass.x_int8.scales[row] = pass.token_scales[pass.routing.row_token[row]];
}

void project_h_to_rank(Pass& pass, const RowBlock& block) {
  const LoraView& view = pass.lora.down;
  float* to = pass.ha + block.begin * view.rank;
  pass.ops->dot_rows(pass.hl_rows + block.begin, block.rows(), view.a + block.expert * view.a_expert, view.a_rank,
                     view.rank, pass.shape().inter, to, view.rank, false);
  scale_values(to, block.rows() * view.rank, pass.scale_of(view));
}

void add_lora(const Pass& pass, const float* xa, const LoraView& lora, const RowBlock& block, int64_t col, int64_t cols,
              float* sum, int64_t ldc) {
  const float* rows[kMaxRank];
  rank_rows(lora.b + block.expert * lora.b_expert, lora.b_rank, lora.rank, rows);
  pass.ops->axpy_factor(xa + block.begin * lora.rank, lora.rank, 1, block.rows(), rows, col, lora.rank, sum, ldc, cols,
                        true);
}

void add_bias(const Pass& pass, const float* bias, int64_t width, const RowBlock& block, int64_t col, int64_t cols,
              float* sum, int64_t ldc) {
  if (bias == nullptr) return;
  const float* row = bias + block.expert * width + col;
  for (int64_t i = 0; i < block.rows(); ++i) pass.ops->scale_add(1.0f, row, cols, sum + i * ldc);
}

namespace {

void quantize_h(Pass& pass, const RowBlock& piece) {
  const int64_t inter = pass.shape().inter, stride = align_up(inter, kTileKQ);
  for (int64_t row = piece.begin; row < piece.end; ++row)
    pass.h_int8.scales[row] = pass.ops->quantize_row(pass.h_rows[row], inter, pass.h_int8.values + row * stride);
}

// The rows of a block as the first operand of a base product of the forward.
GemmTask forward_task(const Pass& pass, const RowBlock& block, const bf16_t* const* rows, const Int8Rows& int8,
                      const PackedMatrix& w, const ColumnRange& range, const ThreadScratch& scratch) {
  GemmTask task;
  task.a_rows = rows + block.begin;
  if (int8.values != nullptr) task.q_rows = int8.rows + block.begin, task.q_scales = int8.scales + block.begin;
  task.m = block.rows();
  task.w = &w;
  task.panel_begin = range.panel_begin;
  task.panel_end = range.panel_end;
  task.c = scratch.sum0;
  task.ldc = range.padded_cols;
  task.scratch = scratch.gemm;
  task.block_floating_point = pass.input.rows == Rows::kBfp16;
  return task;
}

// `range` lies in the shard; buffers have the columns of all shards.
void gate_up_task(Pass& pass, int shard, const RowBlock& block, const ColumnRange& range,
                  const ThreadScratch& scratch) {
  const ExpertShape& shape = pass.shape();
  const int64_t ldc = range.padded_cols, stride = shape.inter_stride(),
                col = pass.experts.shards[shard].begin + range.col;
  const Place& weights = pass.experts.place(block.expert, shard);
  GemmTask task = forward_task(pass, block, pass.x_rows, pass.x_int8, weights.gate, range, scratch);
  gemm(Direction::kForward, task);
  task.w = &weights.up;
  task.c = scratch.sum1;
  gemm(Direction::kForward, task);
  if (pass.lora.gate.present()) add_lora(pass, pass.xa_gate, pass.lora.gate, block, col, range.cols, scratch.sum0, ldc);
  if (pass.lora.up.present()) add_lora(pass, pass.xa_up, pass.lora.up, block, col, range.cols, scratch.sum1, ldc);
  add_bias(pass, pass.input.bias.gate, shape.inter, block, col, range.cols, scratch.sum0, ldc);
  add_bias(pass, pass.input.bias.up, shape.inter, block, col, range.cols, scratch.sum1, ldc);

  const GluOps& glu = pass.glu_ops();
  for (int64_t i = 0; i < block.rows(); ++i) {
    const int64_t row = block.begin + i, at = row * stride + col;
    f16_t* g = pass.tape.retained() ? pass.tape.g + at : nullptr;
    f16_t* u = pass.tape.retained() ? pass.tape.u + at : nullptr;
    glu.forward(pass.glu.params, scratch.sum0 + i * ldc, scratch.sum1 + i * ldc, range.cols, g, u, pass.h + at);
    if (pass.h_dropped != nullptr)
      pass.ops->mask_bf16(pass.mask(DropoutStream::kInter, row), col, pass.h + at, range.cols, pass.h_dropped + at);
  }
}

void down_task(Pass& pass, int shard, const ColumnRange& range, const ThreadScratch& scratch, const MoeOutput& out) {
  const int64_t ldc = range.padded_cols;
  std::memset(scratch.tokens, 0, static_cast<size_t>(pass.input.tokens * ldc) * sizeof(float));
  for (int64_t b = 0; b < pass.num_blocks; ++b) {
    const RowBlock& block = pass.blocks[b];
    const PackedMatrix& down = pass.experts.place(block.expert, shard).down;
    GemmTask task = forward_task(pass, block, pass.h_rows, pass.h_int8, down, range, scratch);
    task.a_offset = pass.experts.shards[shard].begin;
    gemm(Direction::kForward, task);
    if (pass.lora.down.present() && shard == 0)
      add_lora(pass, pass.ha, pass.lora.down, block, range.col, range.cols, scratch.sum0, ldc);
    if (shard == 0)
      add_bias(pass, pass.input.bias.down, pass.shape().hidden, block, range.col, range.cols, scratch.sum0, ldc);
    scatter_rows(pass, block, true, scratch.sum0, ldc, range.cols, scratch.tokens, ldc);
  }
  store_tokens(pass, shard, scratch.tokens, ldc, range.col, range.cols, out);
}

}  // namespace

void run_gate_up(Pass& pass) {
  const InterTasks tasks(pass);
  for_shards(*pass.pool, pass.num_shards(), tasks.counts, [&](int shard, int64_t task, int thread) {
    gate_up_task(pass, shard, pass.blocks[tasks.block(shard, task)], tasks.range(pass, shard, task),
                 pass.scratch[thread]);
  });
}

void run_forward(Pass& pass, const MoeOutput& out) {
  if (pass.lora.gate.present() || pass.lora.up.present() || pass.x_dropped != nullptr)
    for_row_pieces(pass, [&](const RowBlock& piece) { project_x_to_rank(pass, piece); });
  quantize_x(pass);
  run_gate_up(pass);
  if (pass.lora.down.present() || pass.h_int8.values != nullptr)
    for_row_pieces(pass, [&](const RowBlock& piece) {
      if (pass.lora.down.present()) project_h_to_rank(pass, piece);
      if (pass.h_int8.values != nullptr) quantize_h(pass, piece);
    });

  const HiddenTasks tasks(pass);
  for_shards(*pass.pool, pass.num_shards(), tasks.counts, [&](int shard, int64_t task, int thread) {
    down_task(pass, shard, tasks.range(pass, task), pass.scratch[thread], out);
  });
  add_shards(pass, out);
}

}  // namespace kts
