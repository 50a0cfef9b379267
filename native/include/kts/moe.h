// The routed experts of one layer: packed weights, forward, backward. Formulas in moe/expert_forward.cc and
// moe/expert_backward.cc; rounding points in docs/numerics.md.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "kts/elementwise.h"
#include "kts/expert_store.h"
#include "kts/gemm.h"
#include "kts/lora.h"
#include "kts/workspace.h"

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

class MoeLayer {
 public:
  // One shard per thread pool of the running process, fewer where inter is too narrow.
  explicit MoeLayer(const MoeShape& shape);

  const MoeShape& shape() const { return shape_; }
  // Of the shards, wherever they lie.
  int64_t packed_bytes() const { return layout_bytes_; }
  static int64_t packed_bytes_for(const MoeShape& shape);

  // gate, up [inter, hidden], down [hidden, inter]; strides in elements. Packs a copy.
  void load_expert(int64_t expert, const bf16_t* gate, int64_t gate_stride, const bf16_t* up, int64_t up_stride,
                   const bf16_t* down, int64_t down_stride);
  // The same with each projection as its format takes it: rows of bf16, or of f16 or blocks as in a GGUF file.
  struct WeightRows {
    const void* data;
    int64_t row_bytes;  // from one to the next
  };
  void load_expert(int64_t expert, const WeightRows& gate, const WeightRows& up, const WeightRows& down);
  // The same of int4 weights as a checkpoint holds them, for format rawint4: nothing is rounded. hidden and inter even.
  void load_expert_int4(int64_t expert, const StoredInt4& gate, const StoredInt4& up, const StoredInt4& down);
  // The stored weights; T is bf16_t (rounded from q * scale) or float.
  template <class T>
  void unpack_expert(int64_t expert, T* gate, int64_t gate_stride, T* up, int64_t up_stride, T* down,
                     int64_t down_stride) const;

  // Computes with `blobs` where they lie, which takes one shard; they must stay unchanged, and `owner` keeps them, until
  // the expert gets other weights or the layer ends.
  void map_expert(int64_t expert, const ExpertBlobs<const char>& blobs, std::shared_ptr<const void> owner = nullptr);
  // Copies `blobs` into the memory of the shards.
  void copy_expert(int64_t expert, const ExpertBlobs<const char>& blobs);
  // The way back: the very bytes that any number of shards would be mapped or copied from. Not into mapped experts.
  void export_expert(int64_t expert, const ExpertBlobs<char>& blobs) const;
  // Bytes of the blobs.
  int64_t gate_blob_bytes() const { return kts::packed_bytes(shape_.format.gate, shape_.inter, shape_.hidden); }
  int64_t up_blob_bytes() const { return kts::packed_bytes(shape_.format.up, shape_.inter, shape_.hidden); }
  int64_t down_blob_bytes() const { return kts::packed_bytes(shape_.format.down, shape_.hidden, shape_.inter); }
  int64_t mapped_experts() const;

  // Experts that have no weights yet.
  int64_t missing_experts() const;

  // out [tokens, hidden]. `chunk` tokens are processed at a time; forward and backward of one tape need the same chunk.
  void forward(const MoeInput& input, const ExpertLora& lora, const Dropout& dropout, int64_t chunk,
               const ForwardTape& tape, const MoeOutput& out) const;

  // dout: bf16 [tokens, hidden], contiguous.
  void backward(const MoeInput& input, const bf16_t* dout, const ExpertLora& lora, const Dropout& dropout,
                int64_t chunk, const ForwardTape& tape, const MoeGrads& grads) const;

  int num_shards() const { return num_shards_; }
  const Shard& shard(int index) const { return shards_[index]; }
  // [shard size, hidden], [shard size, hidden], [hidden, shard size]
  PackedMatrix gate(int64_t expert, int shard) const { return gate_view(shard, place(expert, shard).gate); }
  PackedMatrix up(int64_t expert, int shard) const { return up_view(shard, place(expert, shard).up); }
  PackedMatrix down(int64_t expert, int shard) const { return down_view(shard, place(expert, shard).down); }

 private:
  // Bytes of the packed gate and of gate and up, and of all three, of one expert.
  int64_t gate_bytes(int shard) const;
  int64_t gate_up_bytes(int shard) const;
  int64_t expert_bytes(int shard) const;
  // Calls pack(projection, shard part, packed matrix, panel) for every panel of an expert, in parallel.
  template <class Fn>
  void pack_expert(int64_t expert, Fn&& pack);
  const ExpertBlobs<const char>& place(int64_t expert, int shard) const {
    return places_[static_cast<size_t>(expert * num_shards_ + shard)];
  }
  ExpertBlobs<char> own_place(int64_t expert, int shard);
  void use_own_places(int64_t expert);
  // Drops the weights of an expert; what kept them is returned, to end without the lock.
  [[nodiscard]] std::shared_ptr<const void> forget_expert(int64_t expert);
  void check_index(int64_t expert, const char* message) const;
  int64_t count_missing() const;  // runtime().mutex is held
  bool is_mapped(int64_t expert) const;
  PackedMatrix gate_view(int shard, const void* memory) const;
  PackedMatrix up_view(int shard, const void* memory) const;
  PackedMatrix down_view(int shard, const void* memory) const;
  // The parts of whole matrices that a shard has, in whichever direction bytes are to move.
  template <class Byte>
  void move_shard(bool is_split, const ExpertBlobs<Byte>& whole, const ExpertBlobs<const char>& part, int shard) const;
  void allocate();

  MoeShape shape_;
  int num_shards_ = 1;
  Shard shards_[kMaxShards];
  int64_t shard_offset_[kMaxShards] = {};  // bytes from the start of weights_
  int64_t layout_bytes_ = 0;
  PageBuffer weights_;                               // empty until the first expert is packed or copied
  std::vector<ExpertBlobs<const char>> places_;      // [expert, shard]; null = no weights yet
  std::vector<std::shared_ptr<const void>> owners_;  // [expert], of those that are mapped
};

}  // namespace kts
