// MoeLayer: owns packed weights, cuts calls into chunks of tokens, plans and runs passes. No arithmetic.
#include "../gemm/schedule.h"
#include "kts/moe.h"
#include "kts/openmp.h"
#include "pass.h"

namespace kts {

namespace {

constexpr int64_t kShardAlignment = int64_t{2} << 20;  // a huge page belongs to one node

// Shards end at whole tiles and whole groups or blocks of down.
int make_shards(const MoeShape& shape, int wanted, Shard* shards) {
  const int64_t unit = shape.format.down.k_unit();
  const int64_t units = ceil_div(shape.inter, unit);
  const int count = static_cast<int>(min_i64(min_i64(wanted, kMaxShards), units));
  for (int s = 0; s < count; ++s) {
    const int64_t begin = units * s / count * unit, end = units * (s + 1) / count * unit;
    shards[s] = {begin, min_i64(end, shape.inter) - begin};
  }
  return count;
}

}  // namespace

void check_shape(const MoeShape& shape) {
  KTS_CHECK(shape.num_experts > 0 && shape.hidden > 0 && shape.inter > 0,
            "MoeLayer: num_experts, hidden and inter must be positive");
  KTS_CHECK(shape.hidden <= kMaxInt8RowLength && shape.inter <= kMaxInt8RowLength,
            "MoeLayer: expected hidden and inter of at most 32768");
  KTS_CHECK(shape.num_experts <= kMaxExperts, "MoeLayer: expected at most 1048576 experts");
  check_format(shape.format.gate, shape.hidden);
  check_format(shape.format.up, shape.hidden);
  check_format(shape.format.down, shape.inter);
}

MoeLayer::MoeLayer(const MoeShape& shape) : shape_(shape) {
  check_shape(shape);
  std::lock_guard<std::mutex> lock(runtime().mutex);
  num_shards_ = make_shards(shape, runtime().pool->pools(), shards_);
  for (int s = 0; s < num_shards_; ++s) {
    shard_offset_[s] = layout_bytes_;
    layout_bytes_ += shape.num_experts * expert_bytes(s);
    if (num_shards_ > 1) layout_bytes_ = align_up(layout_bytes_, kShardAlignment);
  }
  places_.resize(static_cast<size_t>(shape.num_experts * num_shards_));
  owners_.resize(static_cast<size_t>(shape.num_experts));
}

bool ExpertFormats::take(Rows rows) const {
  const bool all[] = {takes_rows(gate.kind, rows), takes_rows(up.kind, rows), takes_rows(down.kind, rows)};
  return rows == Rows::kBfp16 ? all[0] || all[1] || all[2] : all[0] && all[1] && all[2];
}

int64_t MoeLayer::packed_bytes_for(const MoeShape& shape) {
  return shape.num_experts * (kts::packed_bytes(shape.format.gate, shape.inter, shape.hidden) +
                              kts::packed_bytes(shape.format.up, shape.inter, shape.hidden) +
                              kts::packed_bytes(shape.format.down, shape.hidden, shape.inter));
}

int64_t MoeLayer::gate_bytes(int shard) const {
  return kts::packed_bytes(shape_.format.gate, shards_[shard].size, shape_.hidden);
}
int64_t MoeLayer::gate_up_bytes(int shard) const {
  return gate_bytes(shard) + kts::packed_bytes(shape_.format.up, shards_[shard].size, shape_.hidden);
}
int64_t MoeLayer::expert_bytes(int shard) const {
  return gate_up_bytes(shard) + kts::packed_bytes(shape_.format.down, shape_.hidden, shards_[shard].size);
}

PackedMatrix MoeLayer::gate_view(int shard, const void* memory) const {
  return packed_view(shape_.format.gate, shards_[shard].size, shape_.hidden, memory);
}
PackedMatrix MoeLayer::up_view(int shard, const void* memory) const {
  return packed_view(shape_.format.up, shards_[shard].size, shape_.hidden, memory);
}
PackedMatrix MoeLayer::down_view(int shard, const void* memory) const {
  return packed_view(shape_.format.down, shape_.hidden, shards_[shard].size, memory);
}

template <class Fn>
void MoeLayer::pack_expert(int64_t expert, Fn&& pack) {
  check_index(expert, "load_expert: expert index out of range");
  std::shared_ptr<const void> former;
  std::lock_guard<std::mutex> lock(runtime().mutex);
  allocate();
  former = forget_expert(expert);  // until all of it is packed
  for (int s = 0; s < num_shards_; ++s) {
    const ExpertBlobs<char> own = own_place(expert, s);
    const PackedMatrix packed[3] = {gate_view(s, own.gate), up_view(s, own.up), down_view(s, own.down)};
    const int64_t inter_panels = packed[0].n_panels();
    runtime().pool->parallel_for(2 * inter_panels + packed[2].n_panels(), [&](int64_t task, int) {
      const int which = task < inter_panels ? 0 : task < 2 * inter_panels ? 1 : 2;
      pack(which, shards_[s], packed[which], task - which * inter_panels);
    });
  }
  use_own_places(expert);
}

void MoeLayer::load_expert(int64_t expert, const WeightRows& gate_w, const WeightRows& up_w, const WeightRows& down_w) {
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

void MoeLayer::load_expert(int64_t expert, const bf16_t* gate_w, int64_t gate_stride, const bf16_t* up_w,
                           int64_t up_stride, const bf16_t* down_w, int64_t down_stride) {
  load_expert(expert, {gate_w, 2 * gate_stride}, {up_w, 2 * up_stride}, {down_w, 2 * down_stride});
}

void MoeLayer::load_expert_int4(int64_t expert, const StoredInt4& gate_w, const StoredInt4& up_w,
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
void MoeLayer::unpack_expert(int64_t expert, T* gate_w, int64_t gate_stride, T* up_w, int64_t up_stride, T* down_w,
                             int64_t down_stride) const {
  check_index(expert, "unpack_expert: expert index out of range");
  std::lock_guard<std::mutex> lock(runtime().mutex);
  KTS_CHECK(place(expert, 0).gate != nullptr, "unpack_expert: this expert has no weights yet");
  for (int s = 0; s < num_shards_; ++s) {
    const int64_t begin = shards_[s].begin;
    const PackedMatrix g = gate(expert, s), u = up(expert, s), d = down(expert, s);
    unpack_panels(g, 0, g.n_panels(), gate_w + begin * gate_stride, gate_stride);
    unpack_panels(u, 0, u.n_panels(), up_w + begin * up_stride, up_stride);
    unpack_panels(d, 0, d.n_panels(), down_w + begin, down_stride);
  }
}
template void MoeLayer::unpack_expert(int64_t, bf16_t*, int64_t, bf16_t*, int64_t, bf16_t*, int64_t) const;
template void MoeLayer::unpack_expert(int64_t, float*, int64_t, float*, int64_t, float*, int64_t) const;

namespace {

constexpr const char* kMissing = "MoeLayer: some experts have no weights yet; call load_expert for every expert first";

void check_lora(const LoraView& view, const char* message) {
  if (view.present()) KTS_CHECK(view.rank <= kMaxRank && view.a != nullptr && view.b != nullptr, message);
}

void check_call(const MoeLayer& layer, const MoeInput& input, const ExpertLora& lora, const Dropout& dropout,
                int64_t chunk) {
  KTS_CHECK(layer.shape().format.take(input.rows),
            "rows: int8 needs int8 or int4 weights, bfp16 those or block types; this layer has others");
  KTS_CHECK(chunk > 0, "chunk_size: expected a positive number of tokens");
  KTS_CHECK(input.top_k == 0 || min_i64(chunk, input.tokens) <= INT32_MAX / input.top_k,
            "chunk_size: expected fewer than 2^31 (token, expert) pairs in a chunk");
  KTS_CHECK(dropout.p >= 0.0f && dropout.p < 1.0f, "dropout: expected 0 <= p < 1");
  check_lora(lora.gate, "lora gate: expected rank 1..256 and both factors");
  check_lora(lora.up, "lora up: expected rank 1..256 and both factors");
  check_lora(lora.down, "lora down: expected rank 1..256 and both factors");
  if (lora.shares_a())
    KTS_CHECK(lora.gate.rank == lora.up.rank && lora.gate.scale == lora.up.scale &&
                  lora.gate.a_expert == lora.up.a_expert && lora.gate.a_rank == lora.up.a_rank,
              "lora: gate and up that share A need one rank, one scale and one layout of it");
}

// The tokens [begin, begin + count) of a call.
struct Chunk {
  int64_t begin, count;
};

Pass make_pass(const MoeLayer& layer, const MoeInput& input, const ExpertLora& lora, const Dropout& dropout,
               const ForwardTape& tape, const Chunk& chunk) {
  Pass pass;
  const int64_t pair = chunk.begin * input.top_k;
  pass.layer = &layer;
  pass.ops = &row_ops(active_isa());
  pass.pool = runtime().pool.get();
  pass.input = {chunk.count,
                input.top_k,
                input.x + chunk.begin * layer.shape().hidden,
                input.topk_ids + pair,
                input.topk_weights + pair,
                input.rows,
                input.bias};
  pass.pair_begin = pair;
  pass.lora = lora;
  pass.dropout = lora.present() ? dropout : Dropout{};
  if (tape.retained()) {
    pass.tape.g = tape.g + pair * layer.shape().inter_stride();
    pass.tape.u = tape.u + pair * layer.shape().inter_stride();
    if (tape.xa_gate != nullptr) pass.tape.xa_gate = tape.xa_gate + pair * lora.gate.rank;
    if (tape.xa_up != nullptr) pass.tape.xa_up = tape.xa_up + pair * lora.up.rank;
  }
  return pass;
}

// Counts, takes and lays out the arena, then routes.
void begin_pass(Pass& pass) {
  Pass counted = pass;
  Arena counting;
  plan_pass(counted, pass.pool->threads(), counting);
  Arena arena = pass_arena(counting.used());
  plan_pass(pass, pass.pool->threads(), arena);
  route_pass(pass);
}

MoeOutput at_token(const MoeOutput& out, int64_t elements) {
  return {out.bf16 == nullptr ? nullptr : out.bf16 + elements, out.f32 == nullptr ? nullptr : out.f32 + elements};
}

}  // namespace

void MoeLayer::forward(const MoeInput& input, const ExpertLora& lora, const Dropout& dropout, int64_t chunk,
                       const ForwardTape& tape, const MoeOutput& out) const {
  std::lock_guard<std::mutex> lock(runtime().mutex);
  check_call(*this, input, lora, dropout, chunk);
  KTS_CHECK(count_missing() == 0, kMissing);
  KTS_CHECK(input.tokens == 0 || (out.bf16 == nullptr) != (out.f32 == nullptr), "MoeLayer: expected one output");
  calm_openmp_threads();
  for (int64_t begin = 0; begin < input.tokens; begin += chunk) {
    Pass pass = make_pass(*this, input, lora, dropout, tape, {begin, min_i64(chunk, input.tokens - begin)});
    begin_pass(pass);
    run_forward(pass, at_token(out, begin * shape_.hidden));
  }
}

void MoeLayer::backward(const MoeInput& input, const bf16_t* dout, const ExpertLora& lora, const Dropout& dropout,
                        int64_t chunk, const ForwardTape& tape, const MoeGrads& grads) const {
  std::lock_guard<std::mutex> lock(runtime().mutex);
  check_call(*this, input, lora, dropout, chunk);
  KTS_CHECK(count_missing() == 0, kMissing);
  calm_openmp_threads();
  if (input.tokens == 0) zero_lora_grads(shape_, lora, grads.lora, nullptr, *runtime().pool);
  for (int64_t begin = 0; begin < input.tokens; begin += chunk) {
    Pass pass = make_pass(*this, input, lora, dropout, tape, {begin, min_i64(chunk, input.tokens - begin)});
    pass.is_backward = true;
    pass.recomputes = !tape.retained();
    pass.dout = dout + begin * shape_.hidden;
    pass.adds_lora_grads = begin > 0;
    begin_pass(pass);
    if (begin == 0) zero_lora_grads(shape_, lora, grads.lora, &pass.routing, *pass.pool);
    MoeGrads part = grads;
    part.dx = at_token(grads.dx, begin * shape_.hidden);
    if (part.dtopk_weights != nullptr) part.dtopk_weights += begin * input.top_k;
    run_backward(pass, part);
  }
}

}  // namespace kts
