// topk_ids [tokens, k] -> rows grouped by expert.
#pragma once
#include <cstdint>

namespace kts {

// Row r of a pass is one (token, slot) pair; rows of one expert are contiguous and in ascending (token, slot) order.
// An id >= num_experts is a sentinel: its pair gets no row. All arrays live in the caller's arena.
struct Routing {
  int64_t num_rows = 0;
  int64_t num_active = 0;
  int64_t* offsets = nullptr;    // [num_experts + 1] first row of each expert
  int32_t* active = nullptr;     // [num_active] experts that have rows, ascending
  int32_t* row_token = nullptr;  // [num_rows]
  int32_t* row_pair = nullptr;   // [num_rows] token * k + slot
};

// Fills `routing` (arrays allocated by the caller for tokens * k rows). ids must be >= 0.
void group_by_expert(const int64_t* topk_ids, int64_t tokens, int64_t k, int64_t num_experts, Routing* routing);

}  // namespace kts
