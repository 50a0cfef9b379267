// The packed layout is the formula of kts/gemm.h, padded with zeros, and unpacking is exact.
#include <vector>

#include "check.h"
#include "kts/gemm.h"

namespace kts::test {

KTS_TEST(packing_follows_the_formula_and_round_trips) {
  for (const auto& [n, k] :
       {std::pair<int64_t, int64_t>{1, 1}, {16, 32}, {17, 33}, {31, 95}, {64, 64}, {100, 7}, {1408, 40}}) {
    std::vector<bf16_t> w(static_cast<size_t>(n * (k + 5)));
    for (size_t i = 0; i < w.size(); ++i) w[i] = static_cast<bf16_t>(i * 40503u + 1u);
    std::vector<bf16_t> packed(static_cast<size_t>(packed_bytes(Format::kBf16, n, k)) / 2, 0xdead);
    pack_panels(w.data(), k + 5, n, k, 0, ceil_div(n, kPanel), packed.data());
    const int64_t k_tiles = ceil_div(k, 32);
    for (int64_t i = 0; i < align_up(n, 32); ++i)
      for (int64_t j = 0; j < align_up(k, 32); ++j) {
        const int64_t at = ((i / 32 * k_tiles + j / 32) * 2 + i % 32 / 16) * 512 + j % 32 / 2 * 32 + i % 16 * 2 + j % 2;
        const bf16_t want = i < n && j < k ? w[static_cast<size_t>(i * (k + 5) + j)] : bf16_t{0};
        KTS_EXPECT(packed[static_cast<size_t>(at)] == want) << "n=" << n << " k=" << k << " at " << i << ", " << j;
      }
    std::vector<bf16_t> back(w.size(), 0);
    unpack_panels({Format::kBf16, n, k, packed.data()}, 0, ceil_div(n, kPanel), back.data(), k + 5);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < k + 5; ++j)
        KTS_EXPECT(back[static_cast<size_t>(i * (k + 5) + j)] == (j < k ? w[static_cast<size_t>(i * (k + 5) + j)] : 0))
            << i << ", " << j;
  }
}

KTS_TEST(packed_bytes_of_real_models_are_their_own_bytes) {
  for (const auto& [n, k] :
       {std::pair<int64_t, int64_t>{1408, 2048}, {768, 2048}, {2048, 768}, {2048, 7168}, {7168, 2048}})
    KTS_EXPECT(packed_bytes(Format::kBf16, n, k) == n * k * 2) << n << " x " << k;
}

}  // namespace kts::test
