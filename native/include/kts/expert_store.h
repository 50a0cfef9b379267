// What the packed experts of one layer are: formats, sizes, how they are cut into shards, and their form outside of a layer.
#pragma once
#include <cstdint>

#include "kts/elementwise.h"
#include "kts/gemm.h"

namespace kts {

// Weight formats of the three projections: a GGUF file may mix them.
struct ExpertFormats {
  WeightFormat gate, up, down;

  ExpertFormats(WeightFormat all = {}) : gate(all), up(all), down(all) {}  // NOLINT(google-explicit-constructor)
  ExpertFormats(WeightFormat g, WeightFormat u, WeightFormat d) : gate(g), up(u), down(d) {}

  bool is_uniform() const { return gate == up && up == down; }
  // Whether kernels take rows of this kind with every projection.
  bool take(Rows rows) const;
};

struct MoeShape {
  int64_t num_experts = 0;
  int64_t hidden = 0;
  int64_t inter = 0;
  ExpertFormats format;
  Activation activation = Activation::kSilu;
  GateParams gate_params;

  // Row stride, in elements, of g, u and h buffers.
  int64_t inter_stride() const { return align_up(inter, kPanel); }
};

inline constexpr int64_t kMaxExperts = int64_t{1} << 20;  // with the widths below, no size of a layer overflows

// Throws std::invalid_argument for sizes that no layer can have, or that the formats cannot.
void check_shape(const MoeShape& shape);

// Columns [begin, begin + size) of inter. Each thread pool computes and stores its own shard of every expert: gate and up
// rows, down columns, so both directions read local memory, and sums over shards are all that nodes exchange.
struct Shard {
  int64_t begin = 0;
  int64_t size = 0;
};
inline constexpr int kMaxShards = 32;

// One expert's packed matrices as they are outside of a layer: whole, not cut into shards, each packed_bytes(format, n, k)
// long and aligned to kBlobAlignment.
template <class Byte>
struct ExpertBlobs {
  Byte* gate = nullptr;  // [inter, hidden]
  Byte* up = nullptr;
  Byte* down = nullptr;  // [hidden, inter]
};
inline constexpr int64_t kBlobAlignment = 64;

}  // namespace kts
