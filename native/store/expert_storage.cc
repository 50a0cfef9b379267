// Where the packed experts of a MoeLayer lie: its own node-local memory, or a caller's (a mapped file), and the copies
// between shards and whole matrices. No rounding and no quantising here: bytes move, and the column sums of int8 are
// split and joined.
#include <cstring>
#include <utility>

#include "kts/moe.h"
#include "kts/thread_pool.h"

namespace kts {

namespace {

enum class Transfer { kSplit, kJoin };

int32_t* writable_sums(const PackedMatrix& w, int64_t panel) {
  return const_cast<int32_t*>(w.column_sums) + panel * kPanel;
}

// A shard's own matrix and the part of a whole one that it is. whole_sums: of the rows of that part, in the whole (int8).
struct Pair {
  PackedMatrix part, own;
  const int32_t* whole_sums;
  bool is_first;  // of the parts of its rows
};

// One panel, either way. Joining needs the parts of a panel in the order of k.
void move_panel(Transfer transfer, const Pair& pair, int64_t panel) {
  const PackedMatrix &part = pair.part, &own = pair.own;
  transfer == Transfer::kSplit ? copy_panel(part, own, panel) : copy_panel(own, part, panel);
  if (own.column_sums == nullptr) return;
  if (transfer == Transfer::kJoin) {
    int32_t* sums = const_cast<int32_t*>(pair.whole_sums) + panel * kPanel;
    for (int64_t n = 0; n < kPanel; ++n) sums[n] = (pair.is_first ? 0 : sums[n]) + own.column_sums[panel * kPanel + n];
  } else if (part.column_sums == nullptr) {
    sum_columns(own, panel, writable_sums(own, panel));
  } else {
    std::memcpy(writable_sums(own, panel), part.column_sums + panel * kPanel, kPanel * sizeof(int32_t));
  }
}

void move_expert(Transfer transfer, const Pair (&pairs)[3]) {
  const int64_t first = pairs[0].own.n_panels(), second = first + pairs[1].own.n_panels();
  runtime().pool->parallel_for(second + pairs[2].own.n_panels(), [&](int64_t task, int) {
    const int which = task < first ? 0 : task < second ? 1 : 2;
    move_panel(transfer, pairs[which], task - (which == 0 ? 0 : which == 1 ? first : second));
  });
}

void check_blob(const void* blob) {
  KTS_CHECK(blob != nullptr && reinterpret_cast<uintptr_t>(blob) % kBlobAlignment == 0,
            "packed expert: expected memory aligned to 64 bytes");
}

template <class Byte>
void check_blobs(const ExpertBlobs<Byte>& blobs) {
  check_blob(blobs.gate);
  check_blob(blobs.up);
  check_blob(blobs.down);
}

constexpr const char* kOutOfRange = "packed expert: expert index out of range";

// Bytes [begin, begin + bytes).
struct Range {
  const char* begin;
  int64_t bytes;
  bool meets(const Range& other) const { return begin < other.begin + other.bytes && other.begin < begin + bytes; }
};

}  // namespace

void MoeLayer::check_index(int64_t expert, const char* message) const {
  KTS_CHECK(expert >= 0 && expert < shape_.num_experts, message);
}

void MoeLayer::allocate() {
  if (weights_.data() != nullptr) return;
  weights_ = PageBuffer(static_cast<size_t>(layout_bytes_));
  for (int s = 0; s < num_shards_; ++s) {
    const int64_t end = s + 1 < num_shards_ ? shard_offset_[s + 1] : layout_bytes_;
    place_on_pool(static_cast<char*>(weights_.data()) + shard_offset_[s], static_cast<size_t>(end - shard_offset_[s]),
                  s);
  }
}

ExpertBlobs<char> MoeLayer::own_place(int64_t expert, int shard) {
  char* gate = static_cast<char*>(weights_.data()) + shard_offset_[shard] + expert * expert_bytes(shard);
  return {gate, gate + gate_bytes(shard), gate + gate_up_bytes(shard)};
}

template <class Byte>
void MoeLayer::move_shard(bool is_split, const ExpertBlobs<Byte>& whole, const ExpertBlobs<const char>& part,
                          int shard) const {
  const int64_t begin = shards_[shard].begin, size = shards_[shard].size;
  const auto rows_of = [&](WeightFormat format, const void* blob, const PackedMatrix& own) {
    const PackedMatrix rows =
        packed_part(packed_view(format, shape_.inter, shape_.hidden, blob), begin, size, 0, shape_.hidden);
    return Pair{rows, own, rows.column_sums, true};
  };
  const PackedMatrix down = packed_view(shape_.format.down, shape_.hidden, shape_.inter, whole.down);
  move_expert(
      is_split ? Transfer::kSplit : Transfer::kJoin,
      {rows_of(shape_.format.gate, whole.gate, gate_view(shard, part.gate)),
       rows_of(shape_.format.up, whole.up, up_view(shard, part.up)),
       {packed_part(down, 0, shape_.hidden, begin, size), down_view(shard, part.down), down.column_sums, shard == 0}});
}

std::shared_ptr<const void> MoeLayer::forget_expert(int64_t expert) {
  for (int s = 0; s < num_shards_; ++s) places_[static_cast<size_t>(expert * num_shards_ + s)] = {};
  return std::exchange(owners_[static_cast<size_t>(expert)], nullptr);
}

void MoeLayer::use_own_places(int64_t expert) {
  for (int s = 0; s < num_shards_; ++s) {
    const ExpertBlobs<char> own = own_place(expert, s);
    places_[static_cast<size_t>(expert * num_shards_ + s)] = {own.gate, own.up, own.down};
  }
}

void MoeLayer::map_expert(int64_t expert, const ExpertBlobs<const char>& blobs, std::shared_ptr<const void> owner) {
  check_index(expert, kOutOfRange);
  check_blobs(blobs);
  KTS_CHECK(num_shards_ == 1, "map_expert: expected a layer of one shard; copy packed experts to several pools");
  std::lock_guard<std::mutex> lock(runtime().mutex);
  places_[static_cast<size_t>(expert)] = blobs;
  owners_[static_cast<size_t>(expert)].swap(owner);  // the former one ends with the argument, without the lock
}

void MoeLayer::copy_expert(int64_t expert, const ExpertBlobs<const char>& blobs) {
  check_index(expert, kOutOfRange);
  check_blobs(blobs);
  std::shared_ptr<const void> former;
  std::lock_guard<std::mutex> lock(runtime().mutex);
  allocate();
  for (int s = 0; s < num_shards_; ++s) {
    const ExpertBlobs<char> own = own_place(expert, s);
    move_shard(true, blobs, {own.gate, own.up, own.down}, s);
  }
  former = forget_expert(expert);
  use_own_places(expert);
}

void MoeLayer::export_expert(int64_t expert, const ExpertBlobs<char>& blobs) const {
  check_index(expert, kOutOfRange);
  check_blobs(blobs);
  std::lock_guard<std::mutex> lock(runtime().mutex);
  KTS_CHECK(place(expert, 0).gate != nullptr, "export_expert: this expert has no weights yet");
  const int64_t sizes[] = {gate_blob_bytes(), up_blob_bytes(), down_blob_bytes()};
  const char* const written[] = {blobs.gate, blobs.up, blobs.down};
  for (int64_t e = 0; e < shape_.num_experts; ++e) {
    if (!is_mapped(e)) continue;
    const char* const mapped[] = {place(e, 0).gate, place(e, 0).up, place(e, 0).down};
    for (int to = 0; to < 3; ++to)
      for (int from = 0; from < 3; ++from)
        KTS_CHECK((!Range{written[to], sizes[to]}.meets({mapped[from], sizes[from]})),
                  "export_expert: expected memory that no expert of the layer is mapped from");
  }
  // Scales of some block types end before a multiple of 64.
  std::memset(blobs.gate + gate_blob_bytes() - kBlobAlignment, 0, kBlobAlignment);
  std::memset(blobs.up + up_blob_bytes() - kBlobAlignment, 0, kBlobAlignment);
  std::memset(blobs.down + down_blob_bytes() - kBlobAlignment, 0, kBlobAlignment);
  for (int s = 0; s < num_shards_; ++s) move_shard(false, blobs, place(expert, s), s);
}

int64_t MoeLayer::mapped_experts() const {
  std::lock_guard<std::mutex> lock(runtime().mutex);
  int64_t mapped = 0;
  for (int64_t expert = 0; expert < shape_.num_experts; ++expert) mapped += is_mapped(expert);
  return mapped;
}

bool MoeLayer::is_mapped(int64_t expert) const {
  const char* begin = static_cast<const char*>(weights_.data());
  const char* gate = place(expert, 0).gate;
  const bool own = begin != nullptr && gate >= begin && gate < begin + weights_.bytes();
  return gate != nullptr && !own;
}

int64_t MoeLayer::missing_experts() const {
  std::lock_guard<std::mutex> lock(runtime().mutex);
  return count_missing();
}

int64_t MoeLayer::count_missing() const {
  int64_t missing = 0;
  for (int64_t expert = 0; expert < shape_.num_experts; ++expert) missing += place(expert, 0).gate == nullptr;
  return missing;
}

}  // namespace kts
