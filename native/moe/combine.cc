// Rows of experts back to tokens. A task owns its columns of all tokens, so sums need no locks and run in ascending
// expert order.
#include <cstring>

#include "pass.h"

namespace kts {

void scatter_rows(const Pass& pass, const RowBlock& block, bool weighted, const float* sum, int64_t ldc, int64_t cols,
                  float* tokens, int64_t tokens_stride) {
  for (int64_t i = 0; i < block.rows(); ++i) {
    const int64_t row = block.begin + i;
    pass.ops->scale_add(weighted ? pass.weight(row) : 1.0f, sum + i * ldc, cols,
                        tokens + pass.routing.row_token[row] * tokens_stride);
  }
}

void store_tokens(const Pass& pass, int shard, const float* tokens, int64_t tokens_stride, int64_t col, int64_t cols,
                  const MoeOutput& out) {
  const int64_t hidden = pass.shape().hidden;
  float* f32 = pass.shard_sums == nullptr ? out.f32 : pass.shard_sums + shard * pass.input.tokens * hidden;
  for (int64_t t = 0; t < pass.input.tokens; ++t) {
    const float* from = tokens + t * tokens_stride;
    if (f32 == nullptr) {
      pass.ops->to_bf16(from, cols, out.bf16 + t * hidden + col);
    } else {
      std::memcpy(f32 + t * hidden + col, from, static_cast<size_t>(cols) * sizeof(float));
    }
  }
}

void add_shards(const Pass& pass, const MoeOutput& out) {
  if (pass.shard_sums == nullptr || (out.bf16 == nullptr && out.f32 == nullptr)) return;
  const int64_t hidden = pass.shape().hidden, tokens = pass.input.tokens;
  constexpr int64_t kColumns = 1024;
  const int64_t groups = ceil_div(hidden, kColumns);
  pass.pool->parallel_for(tokens * groups, [&](int64_t task, int) {
    const int64_t token = task / groups, col = task % groups * kColumns, cols = min_i64(kColumns, hidden - col);
    float* sum = pass.shard_sums + token * hidden + col;
    for (int s = 1; s < pass.num_shards(); ++s) pass.ops->scale_add(1.0f, sum + s * tokens * hidden, cols, sum);
    if (out.bf16 != nullptr) {
      pass.ops->to_bf16(sum, cols, out.bf16 + token * hidden + col);
    } else {
      std::memcpy(out.f32 + token * hidden + col, sum, static_cast<size_t>(cols) * sizeof(float));
    }
  });
}

}  // namespace kts
