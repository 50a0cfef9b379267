// Every buffer of a pass, laid out before the first instruction of it runs.
#include "../gemm/schedule.h"
#include "pass.h"

namespace kts {

static void plan_scratch(Pass& pass, int threads, Arena& arena) {
  constexpr int64_t kSum = kRowBlock * kMaxTaskPanels * kPanel;
  pass.scratch = arena.take<ThreadScratch>(threads);
  for (int t = 0; t < threads; ++t) {
    ThreadScratch scratch;
    scratch.gemm = arena.take<std::byte>(kGemmScratchBytes);
    scratch.sum0 = arena.take<float>(kSum);
    scratch.sum1 = arena.take<float>(kSum);
    scratch.tokens = arena.take<float>(pass.input.tokens * kMaxTaskPanels * kPanel);
    if (pass.is_backward && pass.lora.present())
      scratch.experts = arena.take<float>(expert_minor_floats(pass.shape().num_experts));
    if (pass.scratch != nullptr) pass.scratch[t] = scratch;
  }
}

static void plan_lora(Pass& pass, int64_t rows, Arena& arena) {
  const ExpertShape& shape = pass.shape();
  const ExpertLora& lora = pass.lora;
  const auto take_xa = [&](const LoraView& view, float* kept) {
    return kept != nullptr ? kept : arena.take<float>(rows * view.rank);
  };
  if (lora.gate.present()) pass.xa_gate = take_xa(lora.gate, pass.tape.xa_gate);
  if (lora.up.present()) pass.xa_up = lora.shares_a() ? pass.xa_gate : take_xa(lora.up, pass.tape.xa_up);
  if (lora.down.present()) pass.ha = arena.take<float>(rows * lora.down.rank);
  if (pass.drops() && lora.present()) {
    pass.x_dropped = arena.take<bf16_t>(rows * shape.hidden);
    pass.h_dropped = arena.take<bf16_t>(rows * shape.inter_stride());
    pass.xl_rows = arena.take<const bf16_t*>(rows);
    pass.hl_rows = arena.take<const bf16_t*>(rows);
  } else {
    pass.xl_rows = pass.x_rows;
    pass.hl_rows = pass.h_rows;
  }
  if (!pass.is_backward) return;
  if (lora.down.present()) {
    pass.dha = arena.take<float>(rows * lora.down.rank);
    pass.dha_weighted = arena.take<float>(rows * lora.down.rank);
  }
  if (lora.gate.present()) pass.dxa_gate = arena.take<float>(rows * lora.gate.rank);
  if (lora.up.present() && !lora.shares_a()) pass.dxa_up = arena.take<float>(rows * lora.up.rank);
}

static void plan_int8_rows(Int8Rows& int8, int64_t values, int64_t length, int64_t routed_rows, Arena& arena) {
  int8.values = arena.take<int8_t>(values * align_up(length, kTileKQ));
  int8.rows = arena.take<const int8_t*>(routed_rows);
  int8.scales = arena.take<float>(routed_rows);
}

void plan_pass(Pass& pass, int threads, Arena& arena) {
  const ExpertShape& shape = pass.shape();
  const int64_t rows = pass.input.tokens * pass.input.top_k;
  const int64_t stride = shape.inter_stride();
  pass.routing.offsets = arena.take<int64_t>(shape.num_experts + 1);
  pass.routing.active = arena.take<int32_t>(shape.num_experts);
  pass.routing.row_token = arena.take<int32_t>(rows);
  pass.routing.row_pair = arena.take<int32_t>(rows);
  pass.blocks = arena.take<RowBlock>(rows / kRowBlock + min_i64(rows, shape.num_experts));
  pass.x_rows = arena.take<const bf16_t*>(rows);
  pass.h_rows = arena.take<const bf16_t*>(rows);
  pass.h = arena.take<bf16_t>(rows * stride);
  if (pass.recomputes) {
    pass.tape.g = arena.take<f16_t>(rows * stride);
    pass.tape.u = arena.take<f16_t>(rows * stride);
  }
  if (pass.is_backward) {
    pass.dout_rows = arena.take<const bf16_t*>(rows);
    pass.dg_rows = arena.take<const bf16_t*>(rows);
    pass.du_rows = arena.take<const bf16_t*>(rows);
    pass.dg = arena.take<bf16_t>(rows * stride);
    pass.du = arena.take<bf16_t>(rows * stride);
    pass.dweight_parts = arena.take<float>(rows * (stride / kPanel));
    if (pass.input.bias.present()) pass.dweight_bias = arena.take<float>(rows);
  }
  if (pass.int8_rows() && (!pass.is_backward || pass.recomputes)) {
    plan_int8_rows(pass.x_int8, pass.input.tokens, shape.hidden, rows, arena);
    pass.token_scales = arena.take<float>(pass.input.tokens);
  }
  if (pass.int8_rows() && !pass.is_backward) plan_int8_rows(pass.h_int8, rows, shape.inter, rows, arena);
  if (pass.num_shards() > 1) pass.shard_sums = arena.take<float>(pass.num_shards() * pass.input.tokens * shape.hidden);
  plan_lora(pass, rows, arena);
  plan_scratch(pass, threads, arena);
}

void route_pass(Pass& pass) {
  const ExpertShape& shape = pass.shape();
  const int64_t stride = shape.inter_stride();
  group_by_expert(pass.input.topk_ids, pass.input.tokens, pass.input.top_k, shape.num_experts, &pass.routing);
  pass.num_blocks = 0;
  for (int64_t i = 0; i < pass.routing.num_active; ++i) {
    const int64_t expert = pass.routing.active[i], end = pass.routing.offsets[expert + 1];
    for (int64_t row = pass.routing.offsets[expert]; row < end; row += kRowBlock)
      pass.blocks[pass.num_blocks++] = {expert, row, min_i64(end, row + kRowBlock)};
  }
  for (int64_t row = 0; row < pass.routing.num_rows; ++row) {
    const int64_t token = pass.routing.row_token[row];
    pass.x_rows[row] = pass.input.x + token * shape.hidden;
    pass.h_rows[row] = pass.h + row * stride;
    if (pass.x_int8.values != nullptr)
      pass.x_int8.rows[row] = pass.x_int8.values + token * align_up(shape.hidden, kTileKQ);
    if (pass.h_int8.values != nullptr)
      pass.h_int8.rows[row] = pass.h_int8.values + row * align_up(shape.inter, kTileKQ);
    if (pass.x_dropped != nullptr) {
      pass.xl_rows[row] = pass.x_dropped + row * shape.hidden;
      pass.hl_rows[row] = pass.h_dropped + row * stride;
    }
    if (pass.is_backward) {
      pass.dout_rows[row] = pass.dout + token * shape.hidden;
      pass.dg_rows[row] = pass.dg + row * stride;
      pass.du_rows[row] = pass.du + row * stride;
    }
  }
}

InterTasks::InterTasks(const Pass& pass) {
  const int threads = static_cast<int>(ceil_div(pass.pool->threads(), pass.num_shards()));
  for (int s = 0; s < pass.num_shards(); ++s) {
    const int64_t panels = ceil_div(pass.experts.shards[s].size, kPanel);
    width[s] = panels_per_task(panels, pass.num_blocks, threads);
    groups[s] = ceil_div(panels, width[s]);
    counts[s] = pass.num_blocks * groups[s];
  }
}

HiddenTasks::HiddenTasks(const Pass& pass) {
  const int threads = static_cast<int>(ceil_div(pass.pool->threads(), pass.num_shards()));
  const int64_t panels = ceil_div(pass.shape().hidden, kPanel);
  width = panels_per_task(panels, 1, threads);
  groups = ceil_div(panels, width);
  for (int s = 0; s < pass.num_shards(); ++s) counts[s] = groups;
}

void rank_rows(const float* factor, int64_t rank_stride, int64_t rank, const float** rows) {
  for (int64_t r = 0; r < rank; ++r) rows[r] = factor + r * rank_stride;
}

void scale_values(float* values, int64_t count, float scale) {
  for (int64_t i = 0; i < count; ++i) values[i] *= scale;
}

}  // namespace kts
