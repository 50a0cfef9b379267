// The packed experts of one layer: what they are, where they lie, and how they get there. Who computes with them takes a
// view (kts/moe.h does); nothing here multiplies.
//
// The table has an entry for each expert and shard. Experts that are loaded or copied lie in the store's own pages, each
// shard near the pool that computes with it; mapped ones lie in whole matrices of the caller's, of which a shard is rows
// of gate and up and columns of down (packed_part). A further kind of memory (shared by ranks, a slot on a device) is a
// PlaceKind, what fills in its Place, and for kernels that cannot read it a condition where views are taken.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "kts/pack.h"
#include "kts/tables.h"
#include "kts/thread_pool.h"
#include "kts/workspace.h"

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

struct ExpertShape {
  int64_t num_experts = 0;
  int64_t hidden = 0;
  int64_t inter = 0;
  ExpertFormats format;

  // Row stride, in elements, of g, u and h buffers.
  int64_t inter_stride() const { return align_up(inter, kPanel); }
};

inline constexpr int64_t kMaxExperts = int64_t{1} << 20;  // with the widths below, no size of a layer overflows

// Throws std::invalid_argument for sizes that no layer can have, or that the formats cannot.
void check_shape(const ExpertShape& shape);

// Columns [begin, begin + size) of inter. Each thread pool computes its own shard of every expert: gate and up rows, down
// columns, so both directions read the pool's part alone, and sums over shards are all that pools exchange.
struct Shard {
  int64_t begin = 0;
  int64_t size = 0;
};
inline constexpr int kMaxShards = 32;

// One expert's packed matrices as they are outside of a store: whole, not cut into shards, each packed_bytes(format, n, k)
// long and aligned to kBlobAlignment.
template <class Byte>
struct ExpertBlobs {
  Byte* gate = nullptr;  // [inter, hidden]
  Byte* up = nullptr;
  Byte* down = nullptr;  // [hidden, inter]
};
inline constexpr int64_t kBlobAlignment = 64;

enum class PlaceKind : int8_t {
  kNone,      // no weights yet
  kOwnPages,  // memory of the store
  kMapped,    // the caller's: a mapped file
};

// The part of an expert that a shard has, where it lies.
struct Place {
  PlaceKind kind = PlaceKind::kNone;
  PackedMatrix gate, up;  // [shard size, hidden]
  PackedMatrix down;      // [hidden, shard size]
};

// A store as those see it who compute. It is taken and used while Runtime::mutex is held; the store outlives it.
struct ExpertsView {
  const ExpertShape* shape = nullptr;
  int num_shards = 0;
  const Shard* shards = nullptr;  // [num_shards]
  const Place* places = nullptr;  // [num_experts, num_shards]
  int64_t missing_experts = 0;    // that have no weights yet

  const Place& place(int64_t expert, int shard) const { return places[expert * num_shards + shard]; }
};

// Runs fn(shard, task, thread) for task in [0, tasks[shard]), the tasks of a shard on the pool that owns its memory first.
template <class Fn>
void for_shards(ThreadPool& pool, int num_shards, const int64_t* tasks, Fn&& fn) {
  if (num_shards > 1 && pool.pools() == num_shards) {
    pool.parallel_for_pools(tasks, fn);
    return;
  }
  int64_t total = 0;
  for (int s = 0; s < num_shards; ++s) total += tasks[s];
  pool.parallel_for(total, [&](int64_t task, int thread) {
    int shard = 0;
    while (task >= tasks[shard]) task -= tasks[shard++];
    fn(shard, task, thread);
  });
}

class ExpertStore {
 public:
  // One shard per thread pool of the running process, fewer where inter is too narrow.
  explicit ExpertStore(const ExpertShape& shape);

  const ExpertShape& shape() const { return shape_; }
  int num_shards() const { return num_shards_; }
  ExpertsView view() const;

  // Of all experts, wherever they lie.
  int64_t packed_bytes() const { return layout_bytes_; }
  static int64_t packed_bytes_for(const ExpertShape& shape);
  // Of the memory that the store has taken: none for mapped experts but the sums of int8 columns where there are several
  // shards.
  int64_t own_bytes() const;
  int64_t missing_experts() const;
  int64_t mapped_experts() const;

  // Rows of a projection as its format takes them: of bf16, or of f16 or blocks as in a GGUF file.
  struct WeightRows {
    const void* data;
    int64_t row_bytes;  // from one to the next
  };
  // gate, up [inter, hidden], down [hidden, inter]. Packs a copy.
  void load_expert(int64_t expert, const WeightRows& gate, const WeightRows& up, const WeightRows& down);
  // The same of int4 weights as a checkpoint holds them, for format rawint4: nothing is rounded. hidden and inter even.
  void load_expert_int4(int64_t expert, const StoredInt4& gate, const StoredInt4& up, const StoredInt4& down);
  // The stored weights; T is bf16_t (rounded from q * scale) or float.
  template <class T>
  void unpack_expert(int64_t expert, T* gate, int64_t gate_stride, T* up, int64_t up_stride, T* down,
                     int64_t down_stride) const;

  // Uses `blobs` where they lie, with any number of shards; they must stay unchanged, and `owner` keeps them, until the
  // expert gets other weights or the store ends.
  void map_expert(int64_t expert, const ExpertBlobs<const char>& blobs, std::shared_ptr<const void> owner = nullptr);
  // Copies `blobs` into the memory of the shards.
  void copy_expert(int64_t expert, const ExpertBlobs<const char>& blobs);
  // The way back: the very bytes that any number of shards would be mapped or copied from. Not into mapped experts.
  void export_expert(int64_t expert, const ExpertBlobs<char>& blobs) const;
  // Bytes of the blobs.
  int64_t gate_blob_bytes() const { return kts::packed_bytes(shape_.format.gate, shape_.inter, shape_.hidden); }
  int64_t up_blob_bytes() const { return kts::packed_bytes(shape_.format.up, shape_.inter, shape_.hidden); }
  int64_t down_blob_bytes() const { return kts::packed_bytes(shape_.format.down, shape_.hidden, shape_.inter); }

 private:
  const Place& place(int64_t expert, int shard) const { return places_[index(expert, shard)]; }
  size_t index(int64_t expert, int shard) const { return static_cast<size_t>(expert * num_shards_ + shard); }
  void put(int64_t expert, int shard, const Place& place);
  // Bytes of the packed gate and of gate and up, and of all three, of one expert.
  int64_t gate_bytes(int shard) const;
  int64_t gate_up_bytes(int shard) const;
  int64_t expert_bytes(int shard) const;
  void allocate();
  // Where the store's own memory has the expert, once allocated.
  Place own_place(int64_t expert, int shard) const;
  // The shard's part of whole matrices.
  template <class Byte>
  Place part_of(const ExpertBlobs<Byte>& blobs, int shard) const;
  // Calls pack(projection, shard part, packed matrix, panel) for every panel of an expert, in parallel.
  template <class Fn>
  void pack_expert(int64_t expert, Fn&& pack);
  void sum_mapped_columns(int64_t expert, Place (&places)[kMaxShards]);
  // Drops the weights of an expert; what kept them is returned, to end without the lock.
  [[nodiscard]] std::shared_ptr<const void> forget_expert(int64_t expert);
  void check_index(int64_t expert, const char* message) const;

  ExpertShape shape_;
  int num_shards_ = 1;
  Shard shards_[kMaxShards];
  int64_t shard_offset_[kMaxShards] = {};  // bytes from the start of pages_
  int64_t layout_bytes_ = 0;
  PageBuffer pages_;           // empty until the first expert is packed or copied
  PageBuffer mapped_sums_;     // of mapped int8: of each shard's columns of down, [expert, shard][align_up(hidden, 32)]
  std::vector<Place> places_;  // [expert, shard]
  int64_t missing_parts_ = 0;  // entries without weights
  std::vector<std::shared_ptr<const void>> owners_;  // [expert], of those that are mapped
};

}  // namespace kts
