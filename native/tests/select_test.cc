// The chosen row by name, for shapes and instruction sets that this machine need not have.
#include <cstring>
#include <vector>

#include "check.h"
#include "kts/elementwise.h"
#include "kts/gemm.h"

namespace kts::test {
namespace {

constexpr int64_t kAny = INT64_MAX;
constexpr int64_t kWide = 2048;  // of n and k
constexpr IsaSet kScalarOnly = kScalar;
constexpr IsaSet kAvx2Cpu = kScalarOnly | kAvx2;
constexpr IsaSet kAvx512Cpu = kAvx2Cpu | kAvx512;
constexpr IsaSet kCascadeLake = kAvx512Cpu | kAvx512Vnni;
constexpr IsaSet kCooperLake = kCascadeLake | kAvx512Bf16;  // and Zen 4
constexpr IsaSet kSapphireRapids = kCooperLake | kAmxBf16 | kAmxInt8;

struct Choice {
  int64_t up_to_m;
  const char* name;
};

struct Want {
  IsaSet isa;
  std::vector<Choice> choices;
};

struct Product {
  Format weights;
  Rows rows;
  Direction direction;
  std::vector<Want> wants;
};

// clang-format off
const Product kProducts[] = {
    {Format::kBf16, Rows::kBf16, Direction::kForward, {
        {kScalarOnly, {{kAny, "gemm_bf16_bf16_f32_1x1_scalar"}}},
        {kAvx2Cpu, {{4, "gemv_bf16_bf16_f32_4x16_avx2"}, {kAny, "gemm_bf16_bf16_f32_6x16_avx2"}}},
        {kAvx512Cpu, {{4, "gemv_bf16_bf16_f32_4x32_avx512"}, {kAny, "gemm_bf16_bf16_f32_12x32_avx512"}}},
        {kCascadeLake, {{4, "gemv_bf16_bf16_f32_4x32_avx512"}, {kAny, "gemm_bf16_bf16_f32_12x32_avx512"}}},
        {kCooperLake, {{4, "gemv_bf16_bf16_f32_4x32_avx512bf16"}, {kAny, "gemm_bf16_bf16_f32_12x32_avx512bf16"}}},
        {kSapphireRapids, {{4, "gemv_bf16_bf16_f32_4x32_avx512bf16"}, {kAny, "gemm_bf16_bf16_f32_32x32_amx"}}},
    }},
    {Format::kBf16, Rows::kBf16, Direction::kInputGrad, {
        {kScalarOnly, {{kAny, "dgrad_bf16_bf16_f32_1x1_scalar"}}},
        {kAvx2Cpu, {{4, "dgemv_bf16_bf16_f32_4x16_avx2"}, {kAny, "dgrad_bf16_bf16_f32_6x16_avx2"}}},
        {kAvx512Cpu, {{4, "dgemv_bf16_bf16_f32_4x32_avx512"}, {kAny, "dgrad_bf16_bf16_f32_12x32_avx512"}}},
        {kCascadeLake, {{4, "dgemv_bf16_bf16_f32_4x32_avx512"}, {kAny, "dgrad_bf16_bf16_f32_12x32_avx512"}}},
        {kCooperLake, {{4, "dgemv_bf16_bf16_f32_4x32_avx512"}, {kAny, "dgrad_bf16_bf16_f32_12x32_avx512bf16"}}},
        {kSapphireRapids, {{4, "dgemv_bf16_bf16_f32_4x32_avx512"}, {kAny, "dgrad_bf16_bf16_f32_32x32_amx"}}},
    }},
    {Format::kInt8, Rows::kBf16, Direction::kForward, {
        {kScalarOnly, {{kAny, "gemm_bf16_s8_f32_1x1_scalar"}}},
        {kAvx2Cpu, {{4, "gemv_bf16_s8_f32_4x16_avx2"}, {kAny, "gemm_bf16_s8_f32_6x16_avx2"}}},
        {kAvx512Cpu, {{4, "gemv_bf16_s8_f32_4x32_avx512"}, {kAny, "gemm_bf16_s8_f32_12x32_avx512"}}},
        {kCascadeLake, {{4, "gemv_bf16_s8_f32_4x32_avx512"}, {kAny, "gemm_bf16_s8_f32_12x32_avx512"}}},
        {kCooperLake, {{4, "gemv_bf16_s8_f32_4x32_avx512bf16"}, {8, "gemm_bf16_s8_f32_12x32_avx512"}, {kAny, "gemm_bf16_s8_f32_12x32_avx512bf16"}}},
        {kSapphireRapids, {{4, "gemv_bf16_s8_f32_4x32_avx512bf16"}, {kAny, "gemm_bf16_s8_f32_32x32_amx"}}},
    }},
    {Format::kInt8, Rows::kBf16, Direction::kInputGrad, {
        {kScalarOnly, {{kAny, "dgrad_bf16_s8_f32_1x1_scalar"}}},
        {kAvx2Cpu, {{4, "dgemv_bf16_s8_f32_4x16_avx2"}, {kAny, "dgrad_bf16_s8_f32_6x16_avx2"}}},
        {kAvx512Cpu, {{4, "dgemv_bf16_s8_f32_4x32_avx512"}, {kAny, "dgrad_bf16_s8_f32_12x32_avx512"}}},
        {kCascadeLake, {{4, "dgemv_bf16_s8_f32_4x32_avx512"}, {kAny, "dgrad_bf16_s8_f32_12x32_avx512"}}},
        {kCooperLake, {{4, "dgemv_bf16_s8_f32_4x32_avx512"}, {8, "dgrad_bf16_s8_f32_12x32_avx512"}, {kAny, "dgrad_bf16_s8_f32_12x32_avx512bf16"}}},
        {kSapphireRapids, {{4, "dgemv_bf16_s8_f32_4x32_avx512"}, {5, "dgrad_bf16_s8_f32_12x32_avx512"}, {kAny, "dgrad_bf16_s8_f32_32x32_amx"}}},
    }},
    {Format::kInt8, Rows::kInt8, Direction::kForward, {
        {kScalarOnly, {{kAny, "gemm_s8_s8_f32_1x1_scalar"}}},
        {kAvx2Cpu, {{4, "gemv_s8_s8_f32_4x16_avx2"}, {kAny, "gemm_s8_s8_f32_6x16_avx2"}}},
        {kAvx512Cpu, {{4, "gemv_s8_s8_f32_4x32_avx512"}, {kAny, "gemm_s8_s8_f32_12x32_avx512"}}},
        {kCascadeLake, {{4, "gemv_s8_s8_f32_4x32_avx512vnni"}, {kAny, "gemm_s8_s8_f32_12x32_avx512vnni"}}},
        {kCooperLake, {{4, "gemv_s8_s8_f32_4x32_avx512vnni"}, {kAny, "gemm_s8_s8_f32_12x32_avx512vnni"}}},
        {kSapphireRapids, {{4, "gemv_s8_s8_f32_4x32_avx512vnni"}, {kAny, "gemm_s8_s8_f32_32x32_amx"}}},
    }},
    {Format::kInt4, Rows::kBf16, Direction::kForward, {
        {kScalarOnly, {{kAny, "gemm_bf16_s4_f32_1x1_scalar"}}},
        {kAvx2Cpu, {{4, "gemv_bf16_s4_f32_4x16_avx2"}, {kAny, "gemm_bf16_s4_f32_6x16_avx2"}}},
        {kAvx512Cpu, {{4, "gemv_bf16_s4_f32_4x32_avx512"}, {kAny, "gemm_bf16_s4_f32_12x32_avx512"}}},
        {kCascadeLake, {{4, "gemv_bf16_s4_f32_4x32_avx512"}, {kAny, "gemm_bf16_s4_f32_12x32_avx512"}}},
        {kCooperLake, {{4, "gemv_bf16_s4_f32_4x32_avx512bf16"}, {8, "gemm_bf16_s4_f32_12x32_avx512"}, {kAny, "gemm_bf16_s4_f32_12x32_avx512bf16"}}},
        {kSapphireRapids, {{4, "gemv_bf16_s4_f32_4x32_avx512bf16"}, {kAny, "gemm_bf16_s4_f32_32x32_amx"}}},
    }},
    {Format::kInt4, Rows::kBf16, Direction::kInputGrad, {
        {kScalarOnly, {{kAny, "dgrad_bf16_s4_f32_1x1_scalar"}}},
        {kAvx2Cpu, {{4, "dgemv_bf16_s4_f32_4x16_avx2"}, {kAny, "dgrad_bf16_s4_f32_6x16_avx2"}}},
        {kAvx512Cpu, {{4, "dgemv_bf16_s4_f32_4x16_avx2"}, {kAny, "dgrad_bf16_s4_f32_12x32_avx512"}}},
        {kCascadeLake, {{4, "dgemv_bf16_s4_f32_4x16_avx2"}, {kAny, "dgrad_bf16_s4_f32_12x32_avx512"}}},
        {kCooperLake, {{4, "dgemv_bf16_s4_f32_4x16_avx2"}, {8, "dgrad_bf16_s4_f32_12x32_avx512"}, {kAny, "dgrad_bf16_s4_f32_12x32_avx512bf16"}}},
        {kSapphireRapids, {{4, "dgemv_bf16_s4_f32_4x16_avx2"}, {5, "dgrad_bf16_s4_f32_12x32_avx512"}, {kAny, "dgrad_bf16_s4_f32_32x32_amx"}}},
    }},
    {Format::kInt4, Rows::kInt8, Direction::kForward, {
        {kScalarOnly, {{kAny, "gemm_s8_s4_f32_1x1_scalar"}}},
        {kAvx2Cpu, {{4, "gemv_s8_s4_f32_4x16_avx2"}, {kAny, "gemm_s8_s4_f32_6x16_avx2"}}},
        {kAvx512Cpu, {{4, "gemv_s8_s4_f32_4x32_avx512"}, {kAny, "gemm_s8_s4_f32_12x32_avx512"}}},
        {kCascadeLake, {{4, "gemv_s8_s4_f32_4x32_avx512vnni"}, {kAny, "gemm_s8_s4_f32_12x32_avx512vnni"}}},
        {kCooperLake, {{4, "gemv_s8_s4_f32_4x32_avx512vnni"}, {kAny, "gemm_s8_s4_f32_12x32_avx512vnni"}}},
        {kSapphireRapids, {{4, "gemv_s8_s4_f32_4x32_avx512vnni"}, {kAny, "gemm_s8_s4_f32_32x32_amx"}}},
    }},
};
// clang-format on

const char* wanted(const Want& want, int64_t m) {
  for (const Choice& choice : want.choices)
    if (m <= choice.up_to_m) return choice.name;
  return "none";
}

}  // namespace

KTS_TEST(selection_takes_the_named_row) {
  for (const Product& product : kProducts)
    for (const Want& want : product.wants)
      for (const int64_t m : {1, 2, 3, 4, 5, 8, 14, 16, 32, 64, 512, 4096}) {
        const KernelRow& row =
            select_gemm({product.weights, product.rows, product.direction, m, kWide, kWide}, want.isa);
        KTS_EXPECT(std::strcmp(row.name, wanted(want, m)) == 0)
            << "m=" << m << " on " << isa_names(want.isa).back() << ": " << row.name << " instead of "
            << wanted(want, m);
      }
}

KTS_TEST(selection_never_takes_the_scalar_row_where_there_is_another) {
  for (const Product& product : kProducts)
    for (const IsaSet isa : {kAvx2Cpu, kAvx512Cpu, kCascadeLake, kCooperLake, kSapphireRapids})
      for (int64_t m = 1; m <= 300; ++m) {
        const KernelRow& row = select_gemm({product.weights, product.rows, product.direction, m, kWide, kWide}, isa);
        KTS_EXPECT(row.isa != kScalar && (row.max_m == 0 || m <= row.max_m)) << row.name << " for m=" << m;
      }
}

// A row that no CPU ever takes is dead weight.
KTS_TEST(every_row_is_taken_somewhere) {
  for (const KernelRow& row : kernel_table()) {
    bool taken = false;
    for (const IsaSet isa : {kScalarOnly, kAvx2Cpu, kAvx512Cpu, kCascadeLake, kCooperLake, kSapphireRapids})
      for (int64_t m = 1; m <= 64 && !taken; ++m)
        taken = &select_gemm({row.format, row.rows, row.direction, m, kWide, kWide}, isa) == &row;
    KTS_EXPECT(taken) << row.name;
  }
}

// n and k scale the estimate and leave the choice alone, but for int8 rows that are too long.
KTS_TEST(judgement_names_the_chosen_row_and_why_others_are_out) {
  const auto find = [](const std::vector<KernelVerdict>& all, const char* name) {
    for (const KernelVerdict& verdict : all)
      if (std::strcmp(verdict.row->name, name) == 0) return verdict;
    return KernelVerdict{nullptr, Refusal::kOtherProduct, 0.0};
  };
  for (const Product& product : kProducts)
    for (const IsaSet isa : {kScalarOnly, kAvx2Cpu, kCascadeLake, kSapphireRapids})
      for (const int64_t m : {1, 4, 5, 64}) {
        const GemmProduct wanted{product.weights, product.rows, product.direction, m, 96, 1408};
        const KernelVerdict* least = nullptr;
        const std::vector<KernelVerdict> verdicts = judge_gemm(wanted, isa);
        for (const KernelVerdict& verdict : verdicts) {
          KTS_EXPECT(verdict.row->format == product.weights && verdict.row->direction == product.direction);
          if (verdict.refusal == Refusal::kNone && (least == nullptr || verdict.cycles < least->cycles))
            least = &verdict;
        }
        KTS_EXPECT(least != nullptr && least->row == &select_gemm(wanted, isa)) << "m=" << m;
      }
  const GemmProduct few{Format::kInt8, Rows::kInt8, Direction::kForward, 1, 64, 64};
  const GemmProduct many{Format::kInt8, Rows::kInt8, Direction::kForward, 5, 64, 64};
  const GemmProduct long_rows{Format::kInt8, Rows::kInt8, Direction::kForward, 5, 64, kMaxInt8RowLength + 1};
  KTS_EXPECT(find(judge_gemm(few, kScalar), "gemm_s8_s8_f32_1x1_scalar").refusal == Refusal::kNone);
  const Refusal absent = find(judge_gemm(few, kScalar), "gemm_s8_s8_f32_32x32_amx").refusal;
  KTS_EXPECT(absent == ((detect_isa() & kAmxInt8) != 0 ? Refusal::kNarrowed : Refusal::kCpu));
  KTS_EXPECT(find(judge_gemm(many, kAvx2Cpu), "gemv_s8_s8_f32_4x16_avx2").refusal == Refusal::kManyRows);
  KTS_EXPECT(find(judge_gemm(few, kAvx2Cpu), "gemm_bf16_s8_f32_6x16_avx2").refusal == Refusal::kOtherRows);
  KTS_EXPECT(find(judge_gemm(long_rows, kAvx2Cpu), "gemm_s8_s8_f32_6x16_avx2").refusal == Refusal::kLongRows);
}

KTS_TEST(inference_takes_int8_rows_where_bytes_are_multiplied_and_block_floating_point_where_there_are_vectors) {
  for (const Format weights : {Format::kBf16, Format::kF16})
    KTS_EXPECT(default_rows(weights, kSapphireRapids) == Rows::kBf16);
  for (const Format weights : {Format::kInt8, Format::kInt4}) {
    KTS_EXPECT(default_rows(weights, kScalarOnly) == Rows::kBf16);
    KTS_EXPECT(default_rows(weights, kAvx512Cpu) == Rows::kBfp16);
    KTS_EXPECT(default_rows(weights, kCascadeLake) == Rows::kInt8);
  }
  KTS_EXPECT(default_rows(Format::kBlock4, kSapphireRapids) == Rows::kBfp16);
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
