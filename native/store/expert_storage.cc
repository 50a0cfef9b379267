// Where the packed experts of a MoeLayer lie: its own node-local memory, or a caller's (a mapped file), and the copies
// between shards and whole matrices. No rounding and no quantising here: bytes move, and the column sums of int8 are
// split and joined.
#include <cstring>
#include <utility>

#include "kts/moe.h"
#include "kts/thread_pool.h"

namespace kts {

namespace {

// Of a panel, both the packed values and the scales are streams of equal steps along k; int8 has no such scales.
struct Streams {
  int64_t value_k;
  int64_t value_bytes;  // two tiles
  int64_t scale_k = 0;
  int64_t scale_bytes = 0;  // of 32 rows
};

Streams streams_of(WeightFormat format) {
  switch (format.kind) {
    case Format::kBf16:
    case Format::kF16:
      return {kTileK, 2 * kTileBytes};
    case Format::kInt8:
      return {kTileKQ, 2 * kTileBytes};
    case Format::kInt4:
      return {kTileKQ, 2 * kTileBytesInt4, format.group, kPanel * static_cast<int64_t>(sizeof(bf16_t))};
    default: {
      const BlockTypeInfo& type = block_type_info(format.type);
      return {kTileKQ, 2 * block_tile_bytes(block_bits(format.kind)), type.block, ScaleRecord(type).bytes};
    }
  }
}

// The matrix of a shard inside the whole one: rows [0, n) and columns [k_begin, k_begin + k) of it from panel_begin on.
struct Part {
  PackedMatrix whole;
  PackedMatrix shard;
  int64_t panel_begin = 0;
  int64_t k_begin = 0;  // a multiple of the streams' steps
};

enum class Transfer { kSplit, kJoin };

char* bytes_of(const void* memory) { return static_cast<char*>(const_cast<void*>(memory)); }

void move_bytes(Transfer transfer, const void* whole, const void* shard, int64_t bytes) {
  if (transfer == Transfer::kSplit)
    std::memcpy(bytes_of(shard), whole, static_cast<size_t>(bytes));
  else
    std::memcpy(bytes_of(whole), shard, static_cast<size_t>(bytes));
}

// Sums over k of the shard's integers, for the 32 rows of a panel.
void sum_columns(const PackedMatrix& w, int64_t panel, int32_t* sums) {
  std::memset(sums, 0, kPanel * sizeof(int32_t));
  const int64_t steps = ceil_div(w.k, kTileKQ);
  for (int64_t step = 0; step < steps; ++step)
    for (int64_t half = 0; half < 2; ++half) {
      const auto* tile = reinterpret_cast<const int8_t*>(w.bytes()) + ((panel * steps + step) * 2 + half) * kTileBytes;
      for (int64_t byte = 0; byte < kTileBytes; ++byte) sums[half * kTileN + byte % 64 / 4] += tile[byte];
    }
}

void move_int8_extras(Transfer transfer, const Part& part, int64_t panel) {
  const int64_t at = (part.panel_begin + panel) * kPanel, here = panel * kPanel;
  move_bytes(transfer, part.whole.int8_scales() + at, part.shard.int8_scales() + here, kPanel * 4);
  if (part.shard.k == part.whole.k)
    return move_bytes(transfer, part.whole.column_sums + at, part.shard.column_sums + here, kPanel * 4);
  if (transfer == Transfer::kSplit) {
    sum_columns(part.shard, panel, const_cast<int32_t*>(part.shard.column_sums) + here);
  } else {
    auto* sums = const_cast<int32_t*>(part.whole.column_sums) + at;
    for (int64_t n = 0; n < kPanel; ++n) sums[n] = (part.k_begin == 0 ? 0 : sums[n]) + part.shard.column_sums[here + n];
  }
}

// `steps` of a stream that begins at panel and step 0 of both matrices.
void move_steps(Transfer transfer, const Part& part, int64_t panel, const void* whole, const void* shard,
                int64_t step_k, int64_t step_bytes) {
  const int64_t whole_steps = ceil_div(part.whole.k, step_k), steps = ceil_div(part.shard.k, step_k);
  const int64_t at = (part.panel_begin + panel) * whole_steps + part.k_begin / step_k;
  move_bytes(transfer, static_cast<const char*>(whole) + at * step_bytes,
             static_cast<const char*>(shard) + panel * steps * step_bytes, steps * step_bytes);
}

// One panel of the shard, either way. Joining needs the parts of a panel in the order of k.
void move_panel(Transfer transfer, const Part& part, int64_t panel) {
  const Streams streams = streams_of(part.whole.format);
  move_steps(transfer, part, panel, part.whole.data, part.shard.data, streams.value_k, streams.value_bytes);
  if (part.whole.format.kind == Format::kInt8) move_int8_extras(transfer, part, panel);
  if (streams.scale_bytes > 0)
    move_steps(transfer, part, panel, part.whole.scales, part.shard.scales, streams.scale_k, streams.scale_bytes);
}

void move_expert(Transfer transfer, const Part (&parts)[3]) {
  const int64_t first = parts[0].shard.n_panels(), second = first + parts[1].shard.n_panels();
  runtime().pool->parallel_for(second + parts[2].shard.n_panels(), [&](int64_t task, int) {
    const int which = task < first ? 0 : task < second ? 1 : 2;
    move_panel(transfer, parts[which], task - (which == 0 ? 0 : which == 1 ? first : second));
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
  const int64_t begin = shards_[shard].begin;
  const ExpertFormats& formats = shape_.format;
  move_expert(
      is_split ? Transfer::kSplit : Transfer::kJoin,
      {{packed_view(formats.gate, shape_.inter, shape_.hidden, whole.gate), gate_view(shard, part.gate), begin / kPanel,
        0},
       {packed_view(formats.up, shape_.inter, shape_.hidden, whole.up), up_view(shard, part.up), begin / kPanel, 0},
       {packed_view(formats.down, shape_.hidden, shape_.inter, whole.down), down_view(shard, part.down), 0, begin}});
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
