// Counting sort of (token, slot) pairs by expert: two passes, stable, O(pairs + experts).
#include "kts/routing.h"

#include "kts/base.h"

namespace kts {

void group_by_expert(const int64_t* topk_ids, int64_t tokens, int64_t k, int64_t num_experts, Routing* routing) {
  const int64_t pairs = tokens * k;
  for (int64_t e = 0; e <= num_experts; ++e) routing->offsets[e] = 0;
  for (int64_t i = 0; i < pairs; ++i) {
    KTS_CHECK(topk_ids[i] >= 0, "topk_ids: expected ids >= 0, got a negative id; pass the router's own output");
    if (topk_ids[i] < num_experts) ++routing->offsets[topk_ids[i] + 1];
  }
  routing->num_active = 0;
  for (int64_t e = 0; e < num_experts; ++e) {
    if (routing->offsets[e + 1] > 0) routing->active[routing->num_active++] = static_cast<int32_t>(e);
    routing->offsets[e + 1] += routing->offsets[e];
  }
  routing->num_rows = routing->offsets[num_experts];
  for (int64_t i = 0; i < pairs; ++i) {
    if (topk_ids[i] >= num_experts) continue;
    const int64_t row = routing->offsets[topk_ids[i]]++;
    routing->row_token[row] = static_cast<int32_t>(i / k);
    routing->row_pair[row] = static_cast<int32_t>(i);
  }
  for (int64_t e = num_experts; e > 0; --e) routing->offsets[e] = routing->offsets[e - 1];
  routing->offsets[0] = 0;
}

}  // namespace kts
