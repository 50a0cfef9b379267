// The packed layout is the formula of kts/packed.h, padded with zeros; bf16 round-trips bit by bit, integers follow the
// quantisers of kts/quant.h.
#include <cmath>
#include <cstring>
#include <vector>

#include "check.h"
#include "kts/pack.h"
#include "packed_problem.h"

namespace kts::test {
namespace {

const std::pair<int64_t, int64_t> kShapes[] = {{1, 1},   {16, 32}, {17, 33},   {31, 95},
                                               {64, 64}, {100, 7}, {1408, 40}, {40, 300}};

std::vector<bf16_t> random_weights(int64_t n, int64_t stride) {
  Random random(static_cast<uint64_t>(n * 1000 + stride));
  std::vector<bf16_t> w(static_cast<size_t>(n * stride));
  for (bf16_t& x : w) x = f32_to_bf16(random.real());
  return w;
}

}  // namespace

KTS_TEST(stored_int4_is_packed_without_changing_a_number) {
  for (const auto& [n, k] : kShapes) {
    if (k % 2 != 0) continue;
    const WeightFormat format{Format::kInt4, 32, BlockType::kNone, true};
    Random random(static_cast<uint64_t>(n + k));
    const int64_t groups = ceil_div(k, 32), stride = k / 2 + 3, scale_stride = groups + 2;
    std::vector<uint8_t> q(static_cast<size_t>(n * stride));
    std::vector<bf16_t> scales(static_cast<size_t>(n * scale_stride));
    for (uint8_t& x : q) x = static_cast<uint8_t>(random.integer(0, 255));
    for (bf16_t& x : scales) x = f32_to_bf16(random.real());
    Bytes memory(packed_bytes(format, n, k), 0xad);
    const PackedMatrix packed = packed_view(format, n, k, memory.data());
    pack_stored_int4({q.data(), stride, scales.data(), scale_stride}, packed, 0, packed.n_panels());
    const PackedMatrix padded = packed_view(format, align_up(n, 32), align_up(k, 64), memory.data());
    for (int64_t i = 0; i < align_up(n, 32); ++i)
      for (int64_t j = 0; j < align_up(k, 64); ++j) {
        const bool inside = i < n && j < k;
        const int want = inside ? (q[static_cast<size_t>(i * stride + j / 2)] >> (j % 2 * 4) & 15) - 8 : 0;
        KTS_EXPECT(packed_integer(padded, i, j) == want) << "n=" << n << " k=" << k << " at " << i << ", " << j;
        if (!inside) continue;
        const float scale = bf16_to_f32(scales[static_cast<size_t>(i * scale_stride + j / 32)]);
        KTS_EXPECT(packed_scale(packed, i, j) == scale) << "n=" << n << " k=" << k << " at " << i << ", " << j;
      }
  }
}

KTS_TEST(packing_bf16_follows_the_formula_and_round_trips) {
  for (const auto& [n, k] : kShapes) {
    std::vector<bf16_t> w(static_cast<size_t>(n * (k + 5)));
    for (size_t i = 0; i < w.size(); ++i) w[i] = static_cast<bf16_t>(i * 40503u + 1u);
    Bytes memory(packed_bytes({}, n, k), 0xad);
    const PackedMatrix packed = packed_view({}, n, k, memory.data());
    pack_panels(w.data(), k + 5, packed, 0, packed.n_panels());
    const bf16_t* data = static_cast<const bf16_t*>(packed.data);
    const int64_t k_tiles = ceil_div(k, 32);
    for (int64_t i = 0; i < align_up(n, 32); ++i)
      for (int64_t j = 0; j < align_up(k, 32); ++j) {
        const int64_t at = ((i / 32 * k_tiles + j / 32) * 2 + i % 32 / 16) * 512 + j % 32 / 2 * 32 + i % 16 * 2 + j % 2;
        const bf16_t want = i < n && j < k ? w[static_cast<size_t>(i * (k + 5) + j)] : bf16_t{0};
        KTS_EXPECT(data[at] == want) << "n=" << n << " k=" << k << " at " << i << ", " << j;
      }
    std::vector<bf16_t> back(w.size(), 0);
    unpack_panels(packed, 0, packed.n_panels(), back.data(), k + 5);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < k + 5; ++j)
        KTS_EXPECT(back[static_cast<size_t>(i * (k + 5) + j)] == (j < k ? w[static_cast<size_t>(i * (k + 5) + j)] : 0))
            << i << ", " << j;
  }
}

KTS_TEST(packing_integers_stores_what_the_quantisers_give) {
  for (const WeightFormat format : {WeightFormat{Format::kInt8, 0}, {Format::kInt4, 32}, {Format::kInt4, 128}})
    for (const auto& [n, k] : kShapes) {
      const int64_t stride = k + 3, group = format.kind == Format::kInt8 ? k : format.group;
      const std::vector<bf16_t> w = random_weights(n, stride);
      Bytes memory(packed_bytes(format, n, k), 0xad);
      const PackedMatrix packed = packed_view(format, n, k, memory.data());
      pack_panels(w.data(), stride, packed, 0, packed.n_panels());
      std::vector<float> back(static_cast<size_t>(n * k));
      unpack_panels(packed, 0, packed.n_panels(), back.data(), k);
      for (int64_t i = 0; i < n; ++i) {
        int32_t sum = 0;
        for (int64_t g = 0; g < k; g += group) {
          std::vector<int8_t> q(static_cast<size_t>(group));
          const int64_t count = min_i64(group, k - g);
          const bf16_t* from = w.data() + i * stride + g;
          const float scale = format.kind == Format::kInt8 ? quantize_row_int8(from, count, q.data())
                                                           : quantize_group_int4(from, count, q.data());
          for (int64_t j = 0; j < count; ++j) {
            sum += q[static_cast<size_t>(j)];
            KTS_EXPECT(packed_integer(packed, i, g + j) == q[static_cast<size_t>(j)]) << n << " x " << k;
            KTS_EXPECT(back[static_cast<size_t>(i * k + g + j)] == scale * q[static_cast<size_t>(j)])
                << n << " x " << k;
          }
        }
        if (format.kind == Format::kInt8) {
          KTS_EXPECT(packed.column_sums[i] == sum) << i;
        }
      }
    }
}

KTS_TEST(int4_scales_have_five_significant_bits) {
  const std::vector<bf16_t> w = random_weights(64, 128);
  for (int64_t i = 0; i < 64; ++i) {
    int8_t q[128];
    for (const int64_t group : {32, 64, 128}) {
      const float scale = quantize_group_int4(w.data() + i * 128, group, q);
      uint32_t bits;
      std::memcpy(&bits, &scale, sizeof(bits));
      KTS_EXPECT((bits & ((1u << 19) - 1)) == 0) << scale;
      for (int64_t j = 0; j < group; ++j)
        KTS_EXPECT(round_to_bf16(scale * q[j]) == scale * q[j]) << scale << " * " << static_cast<int>(q[j]);
    }
  }
}

KTS_TEST(packed_bytes_of_real_models_are_their_own_bytes) {
  for (const auto& [n, k] :
       {std::pair<int64_t, int64_t>{1408, 2048}, {768, 2048}, {2048, 768}, {2048, 7168}, {7168, 2048}, {2048, 1408}}) {
    KTS_EXPECT(packed_bytes({}, n, k) == n * k * 2) << n << " x " << k;
    KTS_EXPECT(packed_bytes({Format::kInt8, 0}, n, k) <= 1.02 * n * k) << n << " x " << k;
    KTS_EXPECT(packed_bytes({Format::kInt4, 32}, n, k) == n * k / 2 + n * k / 16) << n << " x " << k;
  }
}

}  // namespace kts::test
