// MoeLayer: cuts calls into chunks of tokens, plans and runs passes. No arithmetic.
#include "../gemm/schedule.h"
#include "kts/moe.h"
#include "kts/openmp.h"
#include "pass.h"

namespace kts {

namespace {

constexpr const char* kMissing = "MoeLayer: some experts have no weights yet; call load_expert for every expert first";

void check_lora(const LoraView& view, const char* message) {
  if (view.present()) KTS_CHECK(view.rank <= kMaxRank && view.a != nullptr && view.b != nullptr, message);
}

void check_call(const ExpertsView& experts, const MoeInput& input, const ExpertLora& lora, const Dropout& dropout,
                int64_t chunk) {
  KTS_CHECK(experts.shape->format.take(input.rows),
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
  KTS_CHECK(experts.missing_experts == 0, kMissing);
}

// The tokens [begin, begin + count) of a call.
struct Chunk {
  int64_t begin, count;
};

Pass make_pass(const ExpertsView& experts, const Glu& glu, const MoeInput& input, const ExpertLora& lora,
               const Dropout& dropout, const ForwardTape& tape, const Chunk& chunk) {
  Pass pass;
  const int64_t pair = chunk.begin * input.top_k;
  pass.experts = experts;
  pass.glu = glu;
  pass.ops = &row_ops(active_isa());
  pass.pool = runtime().pool.get();
  pass.input = {chunk.count,
                input.top_k,
                input.x + chunk.begin * experts.shape->hidden,
                input.topk_ids + pair,
                input.topk_weights + pair,
                input.rows,
                input.bias};
  pass.pair_begin = pair;
  pass.lora = lora;
  pass.dropout = lora.present() ? dropout : Dropout{};
  if (tape.retained()) {
    pass.tape.g = tape.g + pair * experts.shape->inter_stride();
    pass.tape.u = tape.u + pair * experts.shape->inter_stride();
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
  const ExpertsView experts = store_.view();
  check_call(experts, input, lora, dropout, chunk);
  KTS_CHECK(input.tokens == 0 || (out.bf16 == nullptr) != (out.f32 == nullptr), "MoeLayer: expected one output");
  calm_openmp_threads();
  for (int64_t begin = 0; begin < input.tokens; begin += chunk) {
    Pass pass = make_pass(experts, glu_, input, lora, dropout, tape, {begin, min_i64(chunk, input.tokens - begin)});
    begin_pass(pass);
    run_forward(pass, at_token(out, begin * experts.shape->hidden));
  }
}

void MoeLayer::backward(const MoeInput& input, const bf16_t* dout, const ExpertLora& lora, const Dropout& dropout,
                        int64_t chunk, const ForwardTape& tape, const MoeGrads& grads) const {
  std::lock_guard<std::mutex> lock(runtime().mutex);
  const ExpertsView experts = store_.view();
  check_call(experts, input, lora, dropout, chunk);
  calm_openmp_threads();
  if (input.tokens == 0) zero_lora_grads(*experts.shape, lora, grads.lora, nullptr, *runtime().pool);
  for (int64_t begin = 0; begin < input.tokens; begin += chunk) {
    Pass pass = make_pass(experts, glu_, input, lora, dropout, tape, {begin, min_i64(chunk, input.tokens - begin)});
    pass.is_backward = true;
    pass.recomputes = !tape.retained();
    pass.dout = dout + begin * experts.shape->hidden;
    pass.adds_lora_grads = begin > 0;
    begin_pass(pass);
    if (begin == 0) zero_lora_grads(*experts.shape, lora, grads.lora, &pass.routing, *pass.pool);
    MoeGrads part = grads;
    part.dx = at_token(grads.dx, begin * experts.shape->hidden);
    if (part.dtopk_weights != nullptr) part.dtopk_weights += begin * input.top_k;
    run_backward(pass, part);
  }
}

}  // namespace kts
