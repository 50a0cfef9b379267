// Block types of GGUF files in block floating point (gemv_bfp_inl.h): codes as they are stored times mantissas, exact in
// int32 within a group, then the group's factor and offset. Biases of codes are taken off the sums before they begin.
// Include only from gemm_<format>_<isa>.cc.
#pragma once
#include <utility>

#include "block_weights_inl.h"
#include "gemv_bfp_inl.h"

namespace kts {

// Codes of row R of a group as two vectors of int16: those of k and k + 2, and of k + 1 and k + 3. low: the row's dwords;
// high: the group's line of further bits. Without a table: as stored, the bias left out.
template <class V, int kBits, bool kHigh, bool kTable, int R>
KTS_INLINE void code_pairs(typename V::I low, typename V::I high, typename V::I table, typename V::I (&pairs)[2]) {
  const auto low_byte = V::set1_i(0x00ff00ffu), nibbles = V::set1_i(0x0f0f0f0fu), nibble = V::set1_i(0x000f000fu);
  if constexpr (kBits == 4 && !kTable) {
    pairs[0] = V::and_i(kHigh ? V::template srl_i16<4>(low) : low, nibble);
    pairs[1] = kHigh ? V::template srl_i16<12>(low) : V::and_i(V::template srl_i16<8>(low), nibble);
  } else if constexpr (kBits == 8 || kBits == 4) {
    auto codes = low;
    if constexpr (kBits == 4) codes = V::look_up(table, V::and_i(kHigh ? V::template srl_i16<4>(low) : low, nibbles));
    pairs[0] = V::template sra_i16<8>(V::template sll_i16<8>(codes));
    pairs[1] = V::template sra_i16<8>(codes);
  } else {
    constexpr int kUp = 4 - R * (kBits - 4);  // from bit R or 2 R of a byte to bit 4
    typename V::I moved;
    if constexpr (kUp >= 0)
      moved = V::template sll_i16<kUp>(high);
    else
      moved = V::template srl_i16<-kUp>(high);
    const auto codes = V::or_i(V::and_i(kHigh ? V::template srl_i16<4>(low) : low, nibbles),
                               V::and_i(moved, V::set1_i(kBits == 5 ? 0x10101010u : 0x30303030u)));
    pairs[0] = V::and_i(codes, low_byte);
    pairs[1] = V::template srl_i16<8>(codes);
  }
}

// One group of a block type: its sum times its factor, plus the sum of the row's elements times its offset. NV vectors
// from vector v0 on.
template <class V, class Weights, int MR, bool kHigh, bool kTable, int NV>
KTS_INLINE void add_bfp_group(const Weights& weights, const typename Weights::Block& block, const BfpRows& rows,
                              int64_t b, int part, int v0, float* c, int64_t ldc, StreamAhead& ahead) {
  using I = typename V::I;
  constexpr int kRows = Weights::kRows / Weights::kParts;
  const int16_t* x = rows.mantissas[0] + b * kBfpBlock + part * kRows * Weights::kPerDword;
  const auto sum_of = [&](int i) { return Weights::kParts == 2 ? rows.sums[i][2 * b + part] : rows.block_sum(i, b); };
  I sum[MR][NV], high[NV];
#pragma GCC unroll 4
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) sum[i][v] = V::set1_i(static_cast<uint32_t>(-weights.bias(kTable) * sum_of(i)));
#pragma GCC unroll 2
  for (int v = 0; v < NV; ++v) high[v] = block.template high_line<kHigh>(v0 + v, part);
  const I table = weights.table();
  const auto add_row = [&]<int R>(int j) {
    if (!kHigh && v0 == 0) ahead.step<1, 2 * V::W / kTileN>();
    I pairs[NV][2];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v)
      code_pairs<V, Weights::kBits, kHigh, kTable, R>(block.row(v0 + v, part * kRows + j), high[v], table, pairs[v]);
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; ++odd)
#pragma GCC unroll 4
      for (int i = 0; i < MR; ++i) {
        const I element = V::set1_pair(x + j * Weights::kPerDword + i * kBfpMantissas + 2 * odd);
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) sum[i][v] = V::dot_i16(sum[i][v], pairs[v][odd], element);
      }
  };
  if constexpr (Weights::kExtraLines == 0) {
#pragma GCC unroll 1  // unrolled, loads move up and sums leave the registers
    for (int j = 0; j < kRows; ++j) add_row.template operator()<0>(j);
  } else {  // shifts by constants
    [&]<int... R>(std::integer_sequence<int, R...>) {
      (add_row.template operator()<R>(R), ...);
    }(std::make_integer_sequence<int, kRows>());
  }
#pragma GCC unroll 2
  for (int v = 0; v < NV; ++v) {
    const auto scale = block.scale(v0 + v, part);
    for (int i = 0; i < MR; ++i) {
      float* to = c + i * ldc + (v0 + v) * V::W;
      const float unit = rows.scales[i][b], of_elements = static_cast<float>(sum_of(i)) * unit;
      const auto value = V::fma(V::to_f32(sum[i][v]), V::mul(V::set1(0x1p24f * unit), scale.factor), V::load(to));
      V::store(to, V::fma(V::set1(of_elements), scale.offset, value));
    }
  }
}

// With more rows the group's loop is unrolled around values of its callers, which would then take the registers of sums.
template <class V, class Weights, int MR, bool kHigh, bool kTable, int NV>
[[gnu::noinline]] void add_bfp_group_apart(const Weights& weights, const typename Weights::Block& block,
                                           const BfpRows& rows, int64_t b, int part, int v0, float* c, int64_t ldc,
                                           StreamAhead& ahead) {
  add_bfp_group<V, Weights, MR, kHigh, kTable, NV>(weights, block, rows, b, part, v0, c, ldc, ahead);
}

// One block of 32 k. More rows than two leave registers for the sums of one vector at a time.
template <class V, class Weights, int MR, bool kHigh, bool kTable>
KTS_INLINE void add_bfp_groups(const Weights& weights, const BfpRows& rows, int64_t panel, int64_t tile, int64_t kb,
                               int64_t b, float* c, int64_t ldc, StreamAhead& ahead) {
  constexpr int NV = V::W == 8 && MR > 2 ? 1 : 2;
  const auto block = weights.block(panel, tile, kb);
  if (!kHigh && Weights::kExtraLines > 0) ahead.step<1, 2 * V::W / kTileN * Weights::kExtraLines>();
  for (int part = 0; part < Weights::kParts; ++part)
    for (int v = 0; v < 2; v += NV) {
      if constexpr (MR > 2 && Weights::kExtraLines > 0)
        add_bfp_group_apart<V, Weights, MR, kHigh, kTable, NV>(weights, block, rows, b, part, v, c, ldc, ahead);
      else
        add_bfp_group<V, Weights, MR, kHigh, kTable, NV>(weights, block, rows, b, part, v, c, ldc, ahead);
    }
}

// One panel, as add_bfp_panel.
template <class V, class Weights, int MR, bool kTable>
[[gnu::noinline]] void add_bfp_block_panel(const Weights& weights, const BfpRows& rows, int64_t panel, int64_t kb,
                                           int64_t blocks, float* c, int64_t ldc) {
  StreamAhead ahead(weights.block(panel, 0, kb).rows + kPrefetchBytes, 0);
  for (int64_t b = 0; b < blocks; b += 2)
    for (int s = 0; s < Step<V>::kPerPanel; ++s) {
      float* to = c + s * Step<V>::kCols;
      add_bfp_groups<V, Weights, MR, false, kTable>(weights, rows, panel, s, kb + b, b, to, ldc, ahead);
      if (b + 1 < blocks)
        add_bfp_groups<V, Weights, MR, Weights::kHalves == 2, kTable>(weights, rows, panel, s, kb + b + 1, b + 1, to,
                                                                      ldc, ahead);
    }
}

// Up to kFewRows rows; does not accumulate.
template <class V, class Weights>
void gemv_bfp_blocks(const GemmTask& task) {
  KTS_DCHECKED(check_task(task, {Weights::kFormat, Rows::kBfp16, Direction::kForward, kFewRows}));
  with_rows<kFewRows>(task.m, [&]<int R>() {
    gemv_bfp_rows<V, Weights>(
        task, [&](const Weights& weights, const BfpRows& rows, int64_t panel, int64_t kb, int64_t blocks, float* c) {
          if (Weights::kBits == 4 && weights.has_table())
            add_bfp_block_panel<V, Weights, R, Weights::kBits == 4>(weights, rows, panel, kb, blocks, c, task.ldc);
          else
            add_bfp_block_panel<V, Weights, R, false>(weights, rows, panel, kb, blocks, c, task.ldc);
        });
  });
}

}  // namespace kts
