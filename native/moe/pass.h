// The state of one forward or backward over one chunk of tokens: routing, buffers from the arena, scratch per thread.
#pragma once
#include <cstdint>

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
  float* tokens = nullptr;  // [tokens, 128] sums of all experts for the columns of a task
};

struct Pass {
  const MoeLayer* layer = nullptr;
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
  bf16_t* x_dropped = nullptr;  // [rows, hidden], only with dropout
  bf16_t* h_dropped = nullptr;  // [rows, inter_stride], only with dropout
  bf16_t* h = nullptr;          // [rows, inter_stride]
  ForwardTape tape;             // of the chunk; in a recomputing backward it points into the arena
  float* xa_gate = nullptr;     // [rows, rank] scale * (dropped x) A^T, rounded before the scale
  float* xa_up = nullptr;       // == xa_gate when A is shared
  float* ha = nullptr;          // [rows, rank] the same of h and down.A; times the routing weight in backward

  // backward only
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

  const MoeShape& shape() const { return layer->shape(); }
  bool drops() const { return dropout.p > 0.0f; }
  float scale_of(const LoraView& view) const { return view.scale / (1.0f - dropout.p); }
  RowMask mask(DropoutStream stream, int64_t row) const {
    return row_mask(dropout, stream, static_cast<uint64_t>(pair_begin + routing.row_pair[row]));
  }
  float weight(int64_t row) const { return input.topk_weights[routing.row_pair[row]]; }
};

// Lays out every buffer of a pass of at most input.tokens tokens. On a counting arena only arena.used() is meaningful.
void plan_pass(Pass& pass, int threads, Arena& arena);

// Groups the rows and fills row pointers and blocks.
void route_pass(Pass& pass);

// Pointers to the rank rows of a LoRA factor; `rows` holds kMaxRank entries.
void rank_rows(const bf16_t* factor, int64_t rank_stride, int64_t rank, const bf16_t** rows);

// values = scale * bf16(values)
void round_and_scale(float* values, int64_t count, float scale);

// --- the steps of forward (expert_forward.cc) ---
void project_x_to_rank(Pass& pass, const RowBlock& block);  // xa_gate, xa_up
void project_h_to_rank(Pass& pass, const RowBlock& block);  // ha
void run_gate_up(Pass& pass);                               // h and, where kept, g and u
void run_forward(Pass& pass, const MoeOutput& out);
// Adds scale * (rows A^T) B^T to sums [rows, cols]; `xa` holds the first product.
void add_lora(const Pass& pass, const float* xa, const LoraView& lora, const RowBlock& block, int64_t col, int64_t cols,
              float* sum, int64_t ldc);

// --- backward (expert_backward.cc) ---
void run_backward(Pass& pass, const MoeGrads& grads);

// --- combine.cc ---
// tokens[token, :] += weight * sum[row, :] for the rows of the block; weight 1 when `weighted` is false.
void scatter_rows(const Pass& pass, const RowBlock& block, bool weighted, const float* sum, int64_t ldc, int64_t cols,
                  float* tokens, int64_t tokens_stride);
// Stores columns [col, col + cols) of all tokens.
void store_tokens(const Pass& pass, const float* tokens, int64_t tokens_stride, int64_t col, int64_t cols,
                  const MoeOutput& out);

// --- lora_grad.cc: gradients of A and B, accumulated into grads ---
int64_t num_lora_grad_tasks(const Pass& pass, const ExpertLoraGrads& grads);
void run_lora_grad_task(const Pass& pass, const ExpertLoraGrads& grads, int64_t task);
void zero_lora_grads(const MoeShape& shape, const ExpertLora& lora, const ExpertLoraGrads& grads, ThreadPool& pool);

}  // namespace kts
