// The routed experts of one layer: forward and backward over the weights of a store (kts/expert_store.h). Formulas in
// moe/expert_forward.cc and moe/expert_backward.cc; rounding points in docs/numerics.md.
#pragma once
#include <cstdint>

#include "kts/elementwise.h"
#include "kts/expert_store.h"
#include "kts/gemm.h"
#include "kts/lora.h"

namespace kts {

// Inverted dropout on the input of the LoRA branches; p = 0 turns it off. The mask depends on seed, (token, slot) and
// column only.
struct Dropout {
  float p = 0.0f;
  uint64_t seed = 0;
};

// Added to the products of a layer's experts; all three or none.
struct ExpertBias {
  const float* gate = nullptr;  // [num_experts, inter], contiguous
  const float* up = nullptr;
  const float* down = nullptr;  // [num_experts, hidden]

  bool present() const { return gate != nullptr; }
};

struct MoeInput {
  int64_t tokens = 0;
  int64_t top_k = 0;
  const bf16_t* x = nullptr;            // [tokens, hidden], contiguous
  const int64_t* topk_ids = nullptr;    // [tokens, top_k]
  const float* topk_weights = nullptr;  // [tokens, top_k]
  Rows rows = Rows::kBf16;  // what the base products of the forward take; backward needs the forward's value
  ExpertBias bias{};
};

// Activations that backward needs beside the inputs: the gate and up products by routed row, in f16, whose eleven bits
// cost a third of bf16's rounding error. The memory belongs to the caller (torch tensors), so checkpointing can drop
// it. Null pointers: backward recomputes them.
struct ForwardTape {
  f16_t* g = nullptr;  // [tokens * top_k, inter_stride]
  f16_t* u = nullptr;
  // The LoRA products x A^T, f32 [tokens * top_k, rank]; may be null even where g is kept. up: only with an A of its own.
  float* xa_gate = nullptr;
  float* xa_up = nullptr;

  bool retained() const { return g != nullptr; }
};

struct MoeOutput {  // exactly one of the two
  bf16_t* bf16 = nullptr;
  float* f32 = nullptr;
};

struct MoeGrads {
  MoeOutput dx;                    // [tokens, hidden]; both null = not wanted
  float* dtopk_weights = nullptr;  // [tokens, top_k]; null = not wanted
  ExpertLoraGrads lora;            // null pointers = not wanted; others are overwritten, zeros for experts without rows
};

// The function between the products: h of g and u.
struct Glu {
  Activation activation = Activation::kSilu;
  GateParams params{};
};

// Computes with the experts of a store, which outlives the layer and whose experts may change between calls.
class MoeLayer {
 public:
  explicit MoeLayer(const ExpertStore& store, const Glu& glu = {}) : store_(store), glu_(glu) {}

  const ExpertShape& shape() const { return store_.shape(); }

  // out [tokens, hidden]. `chunk` tokens are processed at a time; forward and backward of one tape need the same chunk.
  void forward(const MoeInput& input, const ExpertLora& lora, const Dropout& dropout, int64_t chunk,
               const ForwardTape& tape, const MoeOutput& out) const;

  // dout: bf16 [tokens, hidden], contiguous.
  void backward(const MoeInput& input, const bf16_t* dout, const ExpertLora& lora, const Dropout& dropout,
                int64_t chunk, const ForwardTape& tape, const MoeGrads& grads) const;

 private:
  const ExpertStore& store_;
  Glu glu_;
};

}  // namespace kts
