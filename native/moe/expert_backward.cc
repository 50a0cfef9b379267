// Backward of the routed experts, for the rows of one expert (w = routing weight of a row, s, m, m' as in
// expert_forward.cc):
//   dh = dout Wd + s m' ((dout Bd) Ad)      f32, before the routing weight: d w = <dh, h> + <dout, bd> holds also for 0
//   dg = w dh u act'(g)                     rounded to bf16 once; other gates have derivatives of their own
//   du = w dh act(g)                        rounded to bf16 once
//   dx[token] = sum over its experts of dg Wg + du Wu + s m ((dg Bg) Ag) + s m ((du Bu) Au), in f32, rounded once
//   dAd = s (w dout Bd)^T (m' h)            dAg, dAu likewise (lora_grad.cc)
//   dBd = s (w dout)^T (m' h Ad^T)          dBg, dBu likewise
// act(g) and act'(g) come from the g and u of the tape; the h of d w is not rounded, the h of dAd and dBd is.
#include <cstring>

#include "../gemm/schedule.h"
#include "pass.h"

namespace kts {

namespace {

// sum [rows, cols] += mask * (coefficients A): the LoRA branch of an input gradient, whose first column is `begin` +
// range.col.
void add_lora_input_grad(const Pass& pass, const LoraView& view, const float* coefficients, DropoutStream stream,
                         const RowBlock& block, int64_t begin, const ColumnRange& range, const ThreadScratch& scratch) {
  const float* rows[kMaxRank];
  rank_rows(view.a + block.expert * view.a_expert, view.a_rank, view.rank, rows);
  float* to = pass.drops() ? scratch.sum1 : scratch.sum0;
  if (pass.drops()) std::memset(to, 0, static_cast<size_t>(block.rows() * range.padded_cols) * sizeof(float));
  pass.ops->axpy_factor(coefficients + block.begin * view.rank, view.rank, 1, block.rows(), rows, begin + range.col,
                        view.rank, to, range.padded_cols, range.cols, true);
  if (!pass.drops()) return;
  for (int64_t i = 0; i < block.rows(); ++i)
    pass.ops->masked_add(pass.mask(stream, block.begin + i), begin + range.col, to + i * range.padded_cols, range.cols,
                         scratch.sum0 + i * range.padded_cols);
}

// dh, and from it dg, du, h and the parts of d topk_weights.
void dh_task(Pass& pass, int shard, const RowBlock& block, const ColumnRange& range, const ThreadScratch& scratch) {
  const ExpertShape& shape = pass.shape();
  const int64_t stride = shape.inter_stride(), panels = stride / kPanel, begin = pass.experts.shards[shard].begin;
  const PackedMatrix& down = pass.experts.place(block.expert, shard).down;
  gemm(Direction::kInputGrad, {pass.dout_rows + block.begin, block.rows(), &down, range.panel_begin, range.panel_end,
                               scratch.sum0, range.padded_cols, false, scratch.gemm});
  if (pass.lora.down.present())
    add_lora_input_grad(pass, pass.lora.down, pass.dha, DropoutStream::kInter, block, begin, range, scratch);
  const GluOps& glu = pass.glu_ops();
  for (int64_t i = 0; i < block.rows(); ++i) {
    const int64_t row = block.begin + i;
    for (int64_t p = range.panel_begin; p < range.panel_end; ++p) {
      const int64_t col = begin + p * kPanel, at = row * stride + col, cols = min_i64(kPanel, shape.inter - col);
      const float* dh = scratch.sum0 + i * range.padded_cols + p * kPanel - range.col;
      pass.dweight_parts[row * panels + col / kPanel] =
          glu.backward(pass.glu.params, pass.tape.g + at, pass.tape.u + at, dh, pass.weight(row), cols, pass.dg + at,
                       pass.du + at, pass.h + at);
      if (pass.h_dropped != nullptr)
        pass.ops->mask_bf16(pass.mask(DropoutStream::kInter, row), col, pass.h + at, cols, pass.h_dropped + at);
    }
  }
}

// dha = s * dout Bd
void project_dout_to_rank(Pass& pass, const RowBlock& block) {
  const LoraView& view = pass.lora.down;
  float* to = pass.dha + block.begin * view.rank;
  pass.ops->dot_rows(pass.dout_rows + block.begin, block.rows(), view.b + block.expert * view.b_expert, view.b_rank,
                     view.rank, pass.shape().hidden, to, view.rank, false);
  scale_values(to, block.rows() * view.rank, pass.scale_of(view));
}

// dxa = s * (dg Bg (+ du Bu where A is shared)); the coefficients of down's gradients get the routing weight.
void project_dgu_to_rank(Pass& pass, const RowBlock& block) {
  const auto project = [&](const LoraView& view, const bf16_t* const* rows, float* to, bool accumulate) {
    pass.ops->dot_rows(rows + block.begin, block.rows(), view.b + block.expert * view.b_expert, view.b_rank, view.rank,
                       pass.shape().inter, to + block.begin * view.rank, view.rank, accumulate);
  };
  const auto finish = [&](const LoraView& view, float* to) {
    scale_values(to + block.begin * view.rank, block.rows() * view.rank, pass.scale_of(view));
  };
  const ExpertLora& lora = pass.lora;
  if (lora.gate.present()) {
    project(lora.gate, pass.dg_rows, pass.dxa_gate, false);
    if (lora.shares_a()) project(lora.up, pass.du_rows, pass.dxa_gate, true);
    finish(lora.gate, pass.dxa_gate);
  }
  if (lora.up.present() && !lora.shares_a()) {
    project(lora.up, pass.du_rows, pass.dxa_up, false);
    finish(lora.up, pass.dxa_up);
  }
  if (!lora.down.present()) return;
  project_h_to_rank(pass, block);
  const int64_t rank = lora.down.rank;
  for (int64_t row = block.begin; row < block.end; ++row)
    for (int64_t r = 0; r < rank; ++r) {
      pass.ha[row * rank + r] *= pass.weight(row);
      pass.dha_weighted[row * rank + r] = pass.dha[row * rank + r] * pass.weight(row);
    }
}

void dx_task(Pass& pass, int shard, const ColumnRange& range, const ThreadScratch& scratch, const MoeOutput& dx) {
  std::memset(scratch.tokens, 0, static_cast<size_t>(pass.input.tokens * range.padded_cols) * sizeof(float));
  for (int64_t b = 0; b < pass.num_blocks; ++b) {
    const RowBlock& block = pass.blocks[b];
    const Place& weights = pass.experts.place(block.expert, shard);
    GemmTask task{pass.dg_rows + block.begin,
                  block.rows(),
                  &weights.gate,
                  range.panel_begin,
                  range.panel_end,
                  scratch.sum0,
                  range.padded_cols,
                  false,
                  scratch.gemm,
                  pass.experts.shards[shard].begin};
    gemm(Direction::kInputGrad, task);
    task.a_rows = pass.du_rows + block.begin;
    task.w = &weights.up;
    task.accumulate = true;
    gemm(Direction::kInputGrad, task);
    if (pass.lora.gate.present() && shard == 0)
      add_lora_input_grad(pass, pass.lora.gate, pass.dxa_gate, DropoutStream::kHidden, block, 0, range, scratch);
    if (pass.dxa_up != nullptr && shard == 0)
      add_lora_input_grad(pass, pass.lora.up, pass.dxa_up, DropoutStream::kHidden, block, 0, range, scratch);
    scatter_rows(pass, block, false, scratch.sum0, range.padded_cols, range.cols, scratch.tokens, range.padded_cols);
  }
  store_tokens(pass, shard, scratch.tokens, range.padded_cols, range.col, range.cols, dx);
}

void store_dtopk_weights(const Pass& pass, float* dtopk_weights) {
  const int64_t panels = pass.shape().inter_stride() / kPanel;
  std::memset(dtopk_weights, 0, static_cast<size_t>(pass.input.tokens * pass.input.top_k) * sizeof(float));
  for (int64_t row = 0; row < pass.routing.num_rows; ++row) {
    float sum = pass.dweight_bias == nullptr ? 0.0f : pass.dweight_bias[row];
    for (int64_t p = 0; p < panels; ++p) sum += pass.dweight_parts[row * panels + p];
    dtopk_weights[pass.routing.row_pair[row]] = sum;
  }
}

}  // namespace

void run_backward(Pass& pass, const MoeGrads& grads) {
  if (pass.lora.present())
    for_row_pieces(pass, [&](const RowBlock& piece) {
      project_x_to_rank(pass, piece);
      if (pass.lora.down.present()) project_dout_to_rank(pass, piece);
    });
  quantize_x(pass);
  if (pass.recomputes) run_gate_up(pass);

  const InterTasks inter(pass);
  for_shards(*pass.pool, pass.num_shards(), inter.counts, [&](int shard, int64_t task, int thread) {
    dh_task(pass, shard, pass.blocks[inter.block(shard, task)], inter.range(pass, shard, task), pass.scratch[thread]);
  });
  if (pass.dweight_bias != nullptr)
    for_row_pieces(pass, [&](const RowBlock& piece) {
      const int64_t hidden = pass.shape().hidden;
      pass.ops->dot_rows(pass.dout_rows + piece.begin, piece.rows(), pass.input.bias.down + piece.expert * hidden,
                         hidden, 1, hidden, pass.dweight_bias + piece.begin, 1, false);
    });
  if (grads.dtopk_weights != nullptr) store_dtopk_weights(pass, grads.dtopk_weights);
  if (pass.lora.present()) for_row_pieces(pass, [&](const RowBlock& piece) { project_dgu_to_rank(pass, piece); });

  const bool wants_dx = grads.dx.bf16 != nullptr || grads.dx.f32 != nullptr;
  const HiddenTasks hidden(pass);
  const int64_t shards = pass.num_shards(), lora_tasks = num_lora_grad_tasks(pass, grads.lora);
  const int64_t dx_tasks = wants_dx ? hidden.groups : 0;
  int64_t counts[kMaxShards];
  for (int64_t s = 0; s < shards; ++s) counts[s] = dx_tasks + (lora_tasks + shards - 1 - s) / shards;
  for_shards(*pass.pool, pass.num_shards(), counts, [&](int shard, int64_t task, int thread) {
    if (task < dx_tasks) {
      dx_task(pass, shard, hidden.range(pass, task), pass.scratch[thread], grads.dx);
    } else {
      run_lora_grad_task(pass, grads.lora, (task - dx_tasks) * shards + shard, pass.scratch[thread]);
    }
  });
  add_shards(pass, grads.dx);
}

}  // namespace kts
