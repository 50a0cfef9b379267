// The table of an ExpertStore and its own, node-local memory; how experts get there from rows, blobs and mapped files, and
// back. Packing is gemm/'s; here bytes lie or move.
#include "kts/expert_store.h"

#include <cstring>
#include <utility>

#include "kts/thread_pool.h"

namespace kts {

namespace {

constexpr int64_t kShardAlignment = int64_t{2} << 20;  // a huge page belongs to one node
constexpr const char* kOutOfRange = "packed expert: expert index out of range";

// Shards end at whole tiles and whole groups or blocks of down.
int make_shards(const ExpertShape& shape, int wanted, Shard* shards) {
  const int64_t unit = shape.format.down.k_unit();
  const int64_t units = ceil_div(shape.inter, unit);
  const int count = static_cast<int>(min_i64(min_i64(wanted, kMaxShards), units));
  for (int s = 0; s < count; ++s) {
    const int64_t begin = units * s / count * unit, end = units * (s + 1) / count * unit;
    shards[s] = {begin, min_i64(end, shape.inter) - begin};
  }
  return count;
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

// Bytes [begin, begin + bytes).
struct Range {
  const void* begin;
  int64_t bytes;
  bool meets(const Range& other) const {
    const auto at = [](const void* memory) { return static_cast<const char*>(memory); };
    return at(begin) < at(other.begin) + other.bytes && at(other.begin) < at(begin) + bytes;
  }
};

int32_t* writable_sums(const PackedMatrix& w, int64_t panel) {
  return const_cast<int32_t*>(w.column_sums) + panel * kPanel;
}

// Fills the panel of a shard's own matrix from the part of a whole one.
void split_panel(const PackedMatrix& part, const PackedMatrix& own, int64_t panel) {
  copy_panel(part, own, panel);
  if (own.column_sums == nullptr) return;
  if (part.column_sums == nullptr)
    sum_columns(own, panel, writable_sums(own, panel));
  else
    std::memcpy(writable_sums(own, panel), part.column_sums + panel * kPanel, kPanel * sizeof(int32_t));
}

// The way back. whole_sums: of the part's rows in the whole matrix (int8), which the first part of them begins.
void join_panel(const PackedMatrix& held, const PackedMatrix& part, int64_t panel, const int32_t* whole_sums,
                bool is_first) {
  copy_panel(held, part, panel);
  if (whole_sums == nullptr) return;
  int32_t* sums = const_cast<int32_t*>(whole_sums) + panel * kPanel;
  for (int64_t n = 0; n < kPanel; ++n) sums[n] = (is_first ? 0 : sums[n]) + held.column_sums[panel * kPanel + n];
}

// Runs fn(0 for gate, 1 for up or 2 for down, panel) for all panels of a shard, in parallel.
template <class Fn>
void for_panels(const Place& place, Fn&& fn) {
  const int64_t first = place.gate.n_panels(), second = first + place.up.n_panels();
  runtime().pool->parallel_for(second + place.down.n_panels(), [&](int64_t task, int) {
    const int which = task < first ? 0 : task < second ? 1 : 2;
    fn(which, task - (which == 0 ? 0 : which == 1 ? first : second));
  });
}

const PackedMatrix& projection(const Place& place, int which) {
  return which == 0 ? place.gate : which == 1 ? place.up : place.down;
}

}  // namespace

void check_shape(const ExpertShape& shape) {
  KTS_CHECK(shape.num_experts > 0 && shape.hidden > 0 && shape.inter > 0,
            "ExpertStore: num_experts, hidden and inter must be positive");
  KTS_CHECK(shape.hidden <= kMaxInt8RowLength && shape.inter <= kMaxInt8RowLength,
            "ExpertStore: expected hidden and inter of at most 32768");
  KTS_CHECK(shape.num_experts <= kMaxExperts, "ExpertStore: expected at most 1048576 experts");
  check_format(shape.format.gate, shape.hidden);
  check_format(shape.format.up, shape.hidden);
  check_format(shape.format.down, shape.inter);
}

bool ExpertFormats::take(Rows rows) const {
  const bool all[] = {takes_rows(gate.kind, rows), takes_rows(up.kind, rows), takes_rows(down.kind, rows)};
  return rows == Rows::kBfp16 ? all[0] || all[1] || all[2] : all[0] && all[1] && all[2];
}

ExpertStore::ExpertStore(const ExpertShape& shape) : shape_(shape) {
  check_shape(shape);
  std::lock_guard<std::mutex> lock(runtime().mutex);
  num_shards_ = make_shards(shape, runtime().pool->pools(), shards_);
  for (int s = 0; s < num_shards_; ++s) {
    shard_offset_[s] = layout_bytes_;
    layout_bytes_ += shape.num_experts * expert_bytes(s);
    if (num_shards_ > 1) layout_bytes_ = align_up(layout_bytes_, kShardAlignment);
  }
  places_.resize(index(shape.num_experts, 0));
  missing_parts_ = shape.num_experts * num_shards_;
  owners_.resize(static_cast<size_t>(shape.num_experts));
}

ExpertsView ExpertStore::view() const {
  return {&shape_, num_shards_, shards_, places_.data(), missing_parts_ / num_shards_};
}

// --- sizes ---

int64_t ExpertStore::packed_bytes_for(const ExpertShape& shape) {
  return shape.num_experts * (kts::packed_bytes(shape.format.gate, shape.inter, shape.hidden) +
                              kts::packed_bytes(shape.format.up, shape.inter, shape.hidden) +
                              kts::packed_bytes(shape.format.down, shape.hidden, shape.inter));
}

int64_t ExpertStore::gate_bytes(int shard) const {
  return kts::packed_bytes(shape_.format.gate, shards_[shard].size, shape_.hidden);
}
int64_t ExpertStore::gate_up_bytes(int shard) const {
  return gate_bytes(shard) + kts::packed_bytes(shape_.format.up, shards_[shard].size, shape_.hidden);
}
int64_t ExpertStore::expert_bytes(int shard) const {
  return gate_up_bytes(shard) + kts::packed_bytes(shape_.format.down, shape_.hidden, shards_[shard].size);
}

int64_t ExpertStore::own_bytes() const {
  std::lock_guard<std::mutex> lock(runtime().mutex);
  return static_cast<int64_t>(pages_.bytes() + mapped_sums_.bytes());
}

int64_t ExpertStore::missing_experts() const {
  std::lock_guard<std::mutex> lock(runtime().mutex);
  return view().missing_experts;
}

int64_t ExpertStore::mapped_experts() const {
  std::lock_guard<std::mutex> lock(runtime().mutex);
  int64_t mapped = 0;
  for (int64_t expert = 0; expert < shape_.num_experts; ++expert) mapped += place(expert, 0).kind == PlaceKind::kMapped;
  return mapped;
}

void ExpertStore::check_index(int64_t expert, const char* message) const {
  KTS_CHECK(expert >= 0 && expert < shape_.num_experts, message);
}

// --- the table; Runtime::mutex is held ---

void ExpertStore::put(int64_t expert, int shard, const Place& place) {
  Place& entry = places_[index(expert, shard)];
  missing_parts_ += (place.kind == PlaceKind::kNone) - (entry.kind == PlaceKind::kNone);
  entry = place;
}

std::shared_ptr<const void> ExpertStore::forget_expert(int64_t expert) {
  for (int s = 0; s < num_shards_; ++s) put(expert, s, {});
  return std::exchange(owners_[static_cast<size_t>(expert)], nullptr);
}

void ExpertStore::allocate() {
  if (pages_.data() != nullptr) return;
  pages_ = PageBuffer(static_cast<size_t>(layout_bytes_));
  for (int s = 0; s < num_shards_; ++s) {
    const int64_t end = s + 1 < num_shards_ ? shard_offset_[s + 1] : layout_bytes_;
    place_on_pool(static_cast<char*>(pages_.data()) + shard_offset_[s], static_cast<size_t>(end - shard_offset_[s]), s);
  }
}

Place ExpertStore::own_place(int64_t expert, int shard) const {
  const char* gate = static_cast<const char*>(pages_.data()) + shard_offset_[shard] + expert * expert_bytes(shard);
  const int64_t size = shards_[shard].size;
  return {PlaceKind::kOwnPages, packed_view(shape_.format.gate, size, shape_.hidden, gate),
          packed_view(shape_.format.up, size, shape_.hidden, gate + gate_bytes(shard)),
          packed_view(shape_.format.down, shape_.hidden, size, gate + gate_up_bytes(shard))};
}

template <class Byte>
Place ExpertStore::part_of(const ExpertBlobs<Byte>& blobs, int shard) const {
  const Shard& columns = shards_[shard];
  const auto rows_of = [&](WeightFormat format, const void* blob) {
    const PackedMatrix whole = packed_view(format, shape_.inter, shape_.hidden, blob);
    return packed_part(whole, columns.begin, columns.size, 0, shape_.hidden);
  };
  const PackedMatrix down = packed_view(shape_.format.down, shape_.hidden, shape_.inter, blobs.down);
  return {PlaceKind::kMapped, rows_of(shape_.format.gate, blobs.gate), rows_of(shape_.format.up, blobs.up),
          packed_part(down, 0, shape_.hidden, columns.begin, columns.size)};
}

// --- experts from rows ---

template <class Fn>
void ExpertStore::pack_expert(int64_t expert, Fn&& pack) {
  check_index(expert, "load_expert: expert index out of range");
  std::shared_ptr<const void> former;
  std::lock_guard<std::mutex> lock(runtime().mutex);
  allocate();
  former = forget_expert(expert);  // until all of it is packed
  for (int s = 0; s < num_shards_; ++s) {
    const Place own = own_place(expert, s);
    for_panels(own, [&](int which, int64_t panel) { pack(which, shards_[s], projection(own, which), panel); });
  }
  for (int s = 0; s < num_shards_; ++s) put(expert, s, own_place(expert, s));
}

void ExpertStore::load_expert(int64_t expert, const WeightRows& gate_w, const WeightRows& up_w,
                              const WeightRows& down_w) {
  pack_expert(expert, [&](int which, const Shard& part, const PackedMatrix& packed, int64_t panel) {
    const WeightRows& w = which == 0 ? gate_w : which == 1 ? up_w : down_w;
    const bool is_bf16 = packed.format.kind < Format::kF16;
    const auto bytes_before = [&](int64_t k) { return is_bf16 ? k * 2 : block_row_bytes(packed.format, k); };
    const auto* from =
        static_cast<const uint8_t*>(w.data) + (which == 2 ? bytes_before(part.begin) : part.begin * w.row_bytes);
    if (!is_bf16) {
      pack_block_panels(from, w.row_bytes, packed, panel, panel + 1);
      return;
    }
    const RowPart columns = which == 2 ? RowPart{part.begin, shape_.inter - part.begin - part.size} : RowPart{};
    pack_panels(reinterpret_cast<const bf16_t*>(from), w.row_bytes / 2, packed, panel, panel + 1, columns);
  });
}

void ExpertStore::load_expert_int4(int64_t expert, const StoredInt4& gate_w, const StoredInt4& up_w,
                                   const StoredInt4& down_w) {
  KTS_CHECK(shape_.format.is_uniform() && shape_.format.gate.any_scale,
            "load_expert_int4: expected a layer of format rawint4");
  KTS_CHECK(shape_.hidden % 2 == 0 && shape_.inter % 2 == 0, "load_expert_int4: expected even hidden and inter");
  pack_expert(expert, [&](int which, const Shard& part, const PackedMatrix& packed, int64_t panel) {
    StoredInt4 w = which == 0 ? gate_w : which == 1 ? up_w : down_w;
    if (which == 2) {  // shards begin with a group
      w.q += part.begin / 2;
      w.scales += part.begin / packed.format.group;
    } else {
      w.q += part.begin * w.stride;
      w.scales += part.begin * w.scale_stride;
    }
    pack_stored_int4(w, packed, panel, panel + 1);
  });
}

template <class T>
void ExpertStore::unpack_expert(int64_t expert, T* gate_w, int64_t gate_stride, T* up_w, int64_t up_stride, T* down_w,
                                int64_t down_stride) const {
  check_index(expert, "unpack_expert: expert index out of range");
  std::lock_guard<std::mutex> lock(runtime().mutex);
  KTS_CHECK(place(expert, 0).kind != PlaceKind::kNone, "unpack_expert: this expert has no weights yet");
  for (int s = 0; s < num_shards_; ++s) {
    const int64_t begin = shards_[s].begin;
    const auto& [kind, gate, up, down] = place(expert, s);
    unpack_panels(gate, 0, gate.n_panels(), gate_w + begin * gate_stride, gate_stride);
    unpack_panels(up, 0, up.n_panels(), up_w + begin * up_stride, up_stride);
    unpack_panels(down, 0, down.n_panels(), down_w + begin, down_stride);
  }
}
template void ExpertStore::unpack_expert(int64_t, bf16_t*, int64_t, bf16_t*, int64_t, bf16_t*, int64_t) const;
template void ExpertStore::unpack_expert(int64_t, float*, int64_t, float*, int64_t, float*, int64_t) const;

// --- experts from blobs, and back ---

// Kernels whose rows are unsigned bytes take the sums off (arch/gemm_s8_inl.h), and a file has those of all columns only.
// Summing reads a third of the expert; the pool that computes with a part reads it, so pages that no process has in memory
// yet come to be near it.
void ExpertStore::sum_mapped_columns(int64_t expert, Place (&places)[kMaxShards]) {
  const int64_t panels = ceil_div(shape_.hidden, kPanel);
  if (mapped_sums_.data() == nullptr)
    mapped_sums_ = PageBuffer(places_.size() * static_cast<size_t>(panels * kPanel) * sizeof(int32_t));
  int64_t tasks[kMaxShards];
  for (int s = 0; s < num_shards_; ++s) {
    tasks[s] = panels;
    places[s].down.column_sums =
        static_cast<const int32_t*>(mapped_sums_.data()) + static_cast<int64_t>(index(expert, s)) * panels * kPanel;
  }
  for_shards(*runtime().pool, num_shards_, tasks, [&](int shard, int64_t panel, int) {
    sum_columns(places[shard].down, panel, writable_sums(places[shard].down, panel));
  });
}

void ExpertStore::map_expert(int64_t expert, const ExpertBlobs<const char>& blobs, std::shared_ptr<const void> owner) {
  check_index(expert, kOutOfRange);
  check_blobs(blobs);
  std::lock_guard<std::mutex> lock(runtime().mutex);
  Place places[kMaxShards];
  for (int s = 0; s < num_shards_; ++s) places[s] = part_of(blobs, s);
  if (shape_.format.down.kind == Format::kInt8 && num_shards_ > 1) sum_mapped_columns(expert, places);
  for (int s = 0; s < num_shards_; ++s) put(expert, s, places[s]);
  owners_[static_cast<size_t>(expert)].swap(owner);  // the former one ends with the argument, without the lock
}

void ExpertStore::copy_expert(int64_t expert, const ExpertBlobs<const char>& blobs) {
  check_index(expert, kOutOfRange);
  check_blobs(blobs);
  std::shared_ptr<const void> former;
  std::lock_guard<std::mutex> lock(runtime().mutex);
  allocate();
  for (int s = 0; s < num_shards_; ++s) {
    const Place part = part_of(blobs, s), own = own_place(expert, s);
    for_panels(own,
               [&](int which, int64_t panel) { split_panel(projection(part, which), projection(own, which), panel); });
  }
  former = forget_expert(expert);
  for (int s = 0; s < num_shards_; ++s) put(expert, s, own_place(expert, s));
}

void ExpertStore::export_expert(int64_t expert, const ExpertBlobs<char>& blobs) const {
  check_index(expert, kOutOfRange);
  check_blobs(blobs);
  std::lock_guard<std::mutex> lock(runtime().mutex);
  KTS_CHECK(place(expert, 0).kind != PlaceKind::kNone, "export_expert: this expert has no weights yet");
  const int64_t sizes[] = {gate_blob_bytes(), up_blob_bytes(), down_blob_bytes()};
  char* const written[] = {blobs.gate, blobs.up, blobs.down};
  for (int64_t e = 0; e < shape_.num_experts; ++e) {
    if (place(e, 0).kind != PlaceKind::kMapped) continue;  // else its first part begins where the blobs do
    for (int to = 0; to < 3; ++to)
      for (int from = 0; from < 3; ++from)
        KTS_CHECK((!Range{written[to], sizes[to]}.meets({projection(place(e, 0), from).data, sizes[from]})),
                  "export_expert: expected memory that no expert of the layer is mapped from");
  }
  // Scales of some block types end before a multiple of 64.
  for (int to = 0; to < 3; ++to) std::memset(written[to] + sizes[to] - kBlobAlignment, 0, kBlobAlignment);
  const PackedMatrix down = packed_view(shape_.format.down, shape_.hidden, shape_.inter, blobs.down);
  for (int s = 0; s < num_shards_; ++s) {
    const Place &held = place(expert, s), part = part_of(blobs, s);
    for_panels(held, [&](int which, int64_t panel) {
      const PackedMatrix& to = projection(part, which);
      join_panel(projection(held, which), to, panel, which == 2 ? down.column_sums : to.column_sums,
                 which != 2 || s == 0);
    });
  }
}

}  // namespace kts
