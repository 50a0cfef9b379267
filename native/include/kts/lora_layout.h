// PEFT keeps some LoRA factors of fused experts as [dim, rank * num_experts], the expert index fastest; the kernels take
// [num_experts, rank, dim]. Both ways in parallel, by blocks that stay in the first-level cache.
#pragma once
#include <cstdint>

namespace kts {

struct LoraLayout {
  int64_t num_experts = 0;
  int64_t rank = 0;
  int64_t dim = 0;
};

// operand [num_experts, rank, dim] = stored [dim, rank * num_experts]
void operand_from_expert_minor(const LoraLayout& layout, const float* stored, float* operand);

// stored [dim, rank * num_experts] = gradient [num_experts, rank, dim]
void gradient_to_expert_minor(const LoraLayout& layout, const float* gradient, float* stored);

}  // namespace kts
