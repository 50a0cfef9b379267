// The state of one forward or backward over one chunk of tokens: routing, buffers from the arena, scratch per thread.
#pragma once
#include <algorithm>
#include <cstdint>

#include "../gemm/schedule.h"
#include "dropout.h"
#include "kts/gemm.h"
#include "kts/moe.h"
#include "kts/routing.h"
#include "kts/thread_pool.h"

namespace kts {

// Rows [begin, end) of one expert: the unit that a task works on.
struct RowBlock {
  int64_t expert = 0;
  int64_t begin = 0;
  int64_t end = 0;
  int64_t rows() const { return end - begin; }
};

struct ThreadScratch {
  std::byte* gemm = nullptr;  // kGemmScratchBytes
  float* sum0 = nullptr;      // [kRowBlock, 128]
  float* sum1 = nullptr;
  float* tokens = nullptr;   // [tokens, 128] sums of all experts for the columns of a task
  float* experts = nullptr;  // [expert_minor_floats()], only in backward with LoRA
};

// Rows of int8 (MoeInput::rows), quantised once from bf16.
struct Int8Rows {
  int8_t* values = nullptr;       // rows of align_up(length, 64): of x one per token, of h one per routed row
  const int8_t** rows = nullptr;  // [routed rows]
  float* scales = nullptr;        // [routed rows]
};

struct Pass {
  ExpertsView experts;
  Glu glu;
  const RowOps* ops = nullptr;
  ThreadPool* pool = nullptr;
  MoeInput input;          // of the chunk
  int64_t pair_begin = 0;  // (token, slot) index of the chunk's first pair in the whole call: names dropout masks
  ExpertLora lora;
  Dropout dropout;
  bool is_backward = false;
  bool recomputes = false;  // backward without retained g and u

  Routing routing;
  RowBlock* blocks = nullptr;
  int64_t num_blocks = 0;
  ThreadScratch* scratch = nullptr;  // [threads]

  const bf16_t** x_rows = nullptr;   // [rows] hidden states of each row
  const bf16_t** xl_rows = nullptr;  // [rows] the same after dropout: input of the LoRA branch
  const bf16_t** h_rows = nullptr;
  const bf16_t** hl_rows = nullptr;
  bf16_t* x_dropped = nullptr;    // [rows, hidden], only with dropout
  bf16_t* h_dropped = nullptr;    // [rows, inter_stride], only with dropout
  bf16_t* h = nullptr;            // [rows, inter_stride]
  Int8Rows x_int8;                // [tokens], only with int8 rows
  float* token_scales = nullptr;  // [tokens] of x_int8
  Int8Rows h_int8;                // [routed rows]
  ForwardTape tape;               // of the chunk; in a recomputing backward it points into the arena
  float* xa_gate = nullptr;       // [rows, rank] scale * (dropped x) A^T
  float* xa_up = nullptr;         // == xa_gate when A is shared
  float* ha = nullptr;            // [rows, rank] the same of h and down.A; times the routing weight in backward
  float* shard_sums = nullptr;    // [shards, tokens, hidden], only with several shards

  // backward only
  bool adds_lora_grads = false;  // to those of earlier chunks
  const bf16_t* dout = nullptr;  // [tokens, hidden] of the chunk
  const bf16_t** dout_rows = nullptr;
  const bf16_t** dg_rows = nullptr;
  const bf16_t** du_rows = nullptr;
  bf16_t* dg = nullptr;  // [rows, inter_stride]
  bf16_t* du = nullptr;
  float* dha = nullptr;  // [rows, rank] scale * dout B_down, without the routing weight
  float* dha_weighted = nullptr;
  float* dxa_gate = nullptr;       // [rows, rank] scale * (dg B_gate (+ du B_up if A is shared))
  float* dxa_up = nullptr;         // null when A is shared
  float* dweight_parts = nullptr;  // [rows, inter panels] <dh, h> of each panel
  float* dweight_bias = nullptr;   // [rows] <dout, down's bias>, only with biases

  const ExpertShape& shape() const { return *experts.shape; }
  const GluOps& glu_ops() const { return ops->glu[static_cast<int>(glu.activation)]; }
  bool drops() const { return dropout.p > 0.0f; }
  float scale_of(const LoraView& view) const { return view.scale / (1.0f - dropout.p); }
  RowMask mask(DropoutStream stream, int64_t row) const {
    return row_mask(dropout, stream, static_cast<uint64_t>(pair_begin + routing.row_pair[row]));
  }
  bool int8_rows() const { return input.rows == Rows::kInt8; }
  int num_shards() const { return experts.num_shards; }
  float weight(int64_t row) const { return input.topk_weights[routing.row_pair[row]]; }
};

// Lays out every buffer of a pass of at most input.tokens tokens. On a counting arena only arena.used() is meaningful.
void plan_pass(Pass& pass, int threads, Arena& arena);

// Groups the rows and fills row pointers and blocks.
void route_pass(Pass& pass);

// sum[i, :] += bias of the block's expert for columns [col, col + cols); bias [num_experts, width], null = none.
void add_bias(const Pass& pass, const float* bias, int64_t width, const RowBlock& block, int64_t col, int64_t cols,
              float* sum, int64_t ldc);

// Pointers to the rank rows of a LoRA factor; `rows` holds kMaxRank entries.
void rank_rows(const float* factor, int64_t rank_stride, int64_t rank, const float** rows);

// values *= scale
void scale_values(float* values, int64_t count, float scale);

// How the columns of inter, in every shard and for every block, are cut into tasks.
struct InterTasks {
  int64_t width[kMaxShards];   // panels
  int64_t groups[kMaxShards];  // column groups of a block
  int64_t counts[kMaxShards];

  explicit InterTasks(const Pass& pass);
  int64_t block(int shard, int64_t task) const { return task / groups[shard]; }
  ColumnRange range(const Pass& pass, int shard, int64_t task) const {
    return column_range(task % groups[shard], width[shard], pass.experts.shards[shard].size);
  }
};

// How the columns of hidden, once per shard, are cut into tasks.
struct HiddenTasks {
  int64_t width;
  int64_t groups;
  int64_t counts[kMaxShards];

  explicit HiddenTasks(const Pass& pass);
  ColumnRange range(const Pass& pass, int64_t task) const { return column_range(task, width, pass.shape().hidden); }
};

// Runs fn(piece) for pieces of the blocks, in parallel and evenly, however the rows are spread over experts: for whole
// blocks, each of which reads the LoRA factors of its expert once, where none of them is more than half a thread's part.
template <class Fn>
void for_row_pieces(const Pass& pass, Fn&& fn) {
  constexpr int64_t kMostRows = 32;
  const auto is_small = [&](const RowBlock& b) { return b.rows() * 2 * pass.pool->threads() <= pass.routing.num_rows; };
  if (std::all_of(pass.blocks, pass.blocks + pass.num_blocks, is_small)) {
    pass.pool->parallel_for(pass.num_blocks, [&](int64_t task, int) { fn(pass.blocks[task]); });
    return;
  }
  const int64_t wanted = pass.routing.num_rows / (4 * pass.pool->threads());
  const int64_t step = wanted < 1 ? 1 : min_i64(wanted, kMostRows);
  pass.pool->parallel_for(ceil_div(pass.routing.num_rows, step), [&](int64_t task, int) {
    int64_t row = task * step;
    const int64_t end = min_i64(row + step, pass.routing.num_rows);
    const RowBlock* block = std::upper_bound(pass.blocks, pass.blocks + pass.num_blocks, row,
                                             [](int64_t r, const RowBlock& b) { return r < b.end; });
    for (; row < end; ++block) {
      fn(RowBlock{block->expert, row, min_i64(end, block->end)});
      row = min_i64(end, block->end);
    }
  });
}

// --- the steps of forward (expert_forward.cc) ---
void project_x_to_rank(Pass& pass, const RowBlock& piece);  // xa_gate, xa_up
void quantize_x(Pass& pass);                                // x_int8, where the pass has it
void project_h_to_rank(Pass& pass, const RowBlock& piece);  // ha
void run_gate_up(Pass& pass);                               // h and, where kept, g and u
void run_forward(Pass& pass, const MoeOutput& out);
// Adds scale * (rows A^T) B^T to sums [rows, cols]; `xa` holds the first product.
void add_lora(const Pass& pass, const float* xa, const LoraView& lora, const RowBlock& block, int64_t col, int64_t cols,
              float* sum, int64_t ldc);

// --- backward (expert_backward.cc) ---
void run_backward(Pass& pass, const MoeGrads& grads);

// --- combine.cc: rows of experts back to tokens ---
// tokens[token, :] += weight * sum[row, :] for the rows of the block; weight 1 when `weighted` is false.
void scatter_rows(const Pass& pass, const RowBlock& block, bool weighted, const float* sum, int64_t ldc, int64_t cols,
                  float* tokens, int64_t tokens_stride);
// Stores columns [col, col + cols) of all tokens: in `out`, or with several shards in the shard's part of shard_sums.
void store_tokens(const Pass& pass, int shard, const float* tokens, int64_t tokens_stride, int64_t col, int64_t cols,
                  const MoeOutput& out);
// With several shards: out = the sum of their parts, in ascending order.
void add_shards(const Pass& pass, const MoeOutput& out);

// --- lora_grad.cc: gradients of A and B ---
// Floats of a thread's scratch for gradients whose expert index is the fastest.
int64_t expert_minor_floats(int64_t num_experts);
int64_t num_lora_grad_tasks(const Pass& pass, const ExpertLoraGrads& grads);
void run_lora_grad_task(const Pass& pass, const ExpertLoraGrads& grads, int64_t task, const ThreadScratch& scratch);
// Zeros what no task writes: the experts without rows; all, if the call has no tokens (null).
void zero_lora_grads(const ExpertShape& shape, const ExpertLora& lora, const ExpertLoraGrads& grads,
                     const Routing* routing, ThreadPool& pool);

}  // namespace kts
