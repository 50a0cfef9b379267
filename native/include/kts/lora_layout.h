// PEFT keeps some LoRA factors of fused experts as [dim, rank * num_experts], the expert index fastest; the kernels take
// [num_experts, rank, dim]. In parallel, by whole cache lines. Gradients go the other way in moe/lora_grad.cc.
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

}  // namespace kts
