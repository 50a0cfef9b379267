// LoRA of one projection for all experts: W_e + scale * B_e A_e, A_e [rank, in], B_e kept transposed: [rank, out].
// Both are read along contiguous in / out, so no product needs a packed copy, whatever the rank is.
#pragma once
#include <cstdint>

#include "kts/types.h"

namespace kts {

inline constexpr int64_t kMaxRank = 256;

struct LoraView {
  const float* a = nullptr;  // a[e * a_expert + r * a_rank + i]
  int64_t a_expert = 0;
  int64_t a_rank = 0;
  const float* b = nullptr;  // b[e * b_expert + r * b_rank + o]
  int64_t b_expert = 0;
  int64_t b_rank = 0;
  int64_t rank = 0;  // 0: no LoRA on this projection
  float scale = 0.0f;

  bool present() const { return rank > 0; }
};

// Where the gradient of one factor goes, f32: data[e * expert + r * rank + i * dim]; null = not wanted. Either dim is 1,
// or the expert index is the fastest (PEFT's [dim, rank * num_experts]): expert = 1, rank = num_experts.
struct FactorGrad {
  float* data = nullptr;
  int64_t expert = 0;
  int64_t rank = 0;
  int64_t dim = 1;

  bool expert_minor() const { return dim != 1; }
};

struct LoraGradView {
  FactorGrad a, b;
};

// gate and up share one A when up.a == gate.a (PEFT's fused gate_up form); then only gate's A gradient is written.
struct ExpertLora {
  LoraView gate, up, down;

  bool present() const { return gate.present() || up.present() || down.present(); }
  bool shares_a() const { return gate.present() && up.present() && gate.a == up.a; }
};

struct ExpertLoraGrads {
  LoraGradView gate, up, down;
};

}  // namespace kts
