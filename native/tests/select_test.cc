// The chosen row by name, for shapes and instruction sets that this machine need not have.
#include <cstring>

#include "check.h"
#include "kts/elementwise.h"
#include "kts/gemm.h"

namespace kts::test {

KTS_TEST(selection_takes_the_widest_level) {
  struct Want {
    IsaSet isa;
    const char* forward;
    const char* grad;
  };
  const Want wants[] = {
      {kScalar, "gemm_bf16_bf16_f32_1x1_scalar", "dgrad_bf16_bf16_f32_1x1_scalar"},
      {kScalar | kAvx2, "gemm_bf16_bf16_f32_6x16_avx2", "dgrad_bf16_bf16_f32_6x16_avx2"},
      {kScalar | kAvx2 | kAvx512, "gemm_bf16_bf16_f32_12x32_avx512", "dgrad_bf16_bf16_f32_12x32_avx512"},
  };
  for (const Want& want : wants)
    for (const int64_t m : {6, 7, 12, 13, 64, 512, 100000}) {
      const KernelRow& forward = select_gemm(Format::kBf16, Rows::kBf16, Direction::kForward, m, want.isa);
      const KernelRow& grad = select_gemm(Format::kBf16, Rows::kBf16, Direction::kInputGrad, m, want.isa);
      KTS_EXPECT(std::strcmp(forward.name, want.forward) == 0) << "m=" << m << ": " << forward.name;
      KTS_EXPECT(std::strcmp(grad.name, want.grad) == 0) << "m=" << m << ": " << grad.name;
    }
}

KTS_TEST(narrowing_is_scoped_and_refuses_unknown_names) {
  const IsaSet before = active_isa();
  {
    ScopedIsa scalar("scalar");
    KTS_EXPECT(active_isa() == kScalar);
    KTS_EXPECT(row_ops(active_isa()).isa == kScalar);
  }
  KTS_EXPECT(active_isa() == before);
  bool refused = false;
  try {
    set_isa("sse9");
  } catch (const std::exception& error) {
    refused = std::strstr(error.what(), "sse9") != nullptr;
  }
  KTS_EXPECT(refused);
}

}  // namespace kts::test
