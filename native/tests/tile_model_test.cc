// The AMX loop nest on the tile model, on any machine: results against the scalar rows, and instruction counts. The same
// nest with the instructions is a row of the table, which gemm_rows_test runs where AMX (or its emulation) exists.
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "../../tests/emulator/amx_sigill.h"
#include "../arch/amx/operands_plain.h"
#include "../arch/amx/tile_nest.h"
#include "../arch/amx/tile_op_model.h"
#include "check.h"
#include "rows_problem.h"

namespace kts::test {
namespace {

using amx::OperandsPlain;
using amx::TileCounts;
using amx::TileOpModel;
using amx::TileShape;

void model_s8_s4(const GemmTask& task) {
  KTS_DCHECK(task.w != nullptr);
  if (task.w->format.group < kTileKQ)
    amx::forward_s8_rows<TileOpModel, OperandsPlain, Format::kInt4, TileShape::kHalf>(task);
  else
    amx::forward_s8_rows<TileOpModel, OperandsPlain, Format::kInt4, TileShape::kFull>(task);
}

struct Product {
  const char* amx_row;  // the row of the table that is this nest on the instructions
  Format format;
  Rows rows;
  Direction direction;
  GemmFn model;
};

const Product kProducts[] = {
    {"gemm_bf16_bf16_f32_32x32_amx", Format::kBf16, Rows::kBf16, Direction::kForward,
     amx::forward_bf16_rows<TileOpModel, OperandsPlain, Format::kBf16>},
    {"gemm_bf16_s8_f32_32x32_amx", Format::kInt8, Rows::kBf16, Direction::kForward,
     amx::forward_bf16_rows<TileOpModel, OperandsPlain, Format::kInt8>},
    {"gemm_bf16_s4_f32_32x32_amx", Format::kInt4, Rows::kBf16, Direction::kForward,
     amx::forward_bf16_rows<TileOpModel, OperandsPlain, Format::kInt4>},
    {"dgrad_bf16_bf16_f32_32x32_amx", Format::kBf16, Rows::kBf16, Direction::kInputGrad,
     amx::input_grad_bf16_rows<TileOpModel, OperandsPlain, Format::kBf16>},
    {"dgrad_bf16_s8_f32_32x32_amx", Format::kInt8, Rows::kBf16, Direction::kInputGrad,
     amx::input_grad_bf16_rows<TileOpModel, OperandsPlain, Format::kInt8>},
    {"dgrad_bf16_s4_f32_32x32_amx", Format::kInt4, Rows::kBf16, Direction::kInputGrad,
     amx::input_grad_bf16_rows<TileOpModel, OperandsPlain, Format::kInt4>},
    {"gemm_s8_s8_f32_32x32_amx", Format::kInt8, Rows::kInt8, Direction::kForward,
     amx::forward_s8_rows<TileOpModel, OperandsPlain, Format::kInt8, TileShape::kFull>},
    {"gemm_s8_s4_f32_32x32_amx", Format::kInt4, Rows::kInt8, Direction::kForward, model_s8_s4},
};

KernelRow row_of(const Product& product, GemmFn run) {
  const Isa isa = product.rows == Rows::kBf16 ? kAmxBf16 : kAmxInt8;
  return {product.amx_row, isa, product.format, product.rows, product.direction, 32, 32, 0, 1, 0, run};
}

KernelRow model_row(const Product& product) { return row_of(product, product.model); }

std::vector<WeightFormat> formats_of(const Product& product) {
  if (product.format != Format::kInt4) return {{product.format, 0}};
  return {{Format::kInt4, 32}, {Format::kInt4, 64}, {Format::kInt4, 128}, {Format::kInt4, 32, BlockType::kNone, true}};
}

// Tails of every side; more than one pass of the sum in either direction; more rows than share a scratch.
const Shape kShapes[] = {{1, 1, 1},    {2, 15, 31},  {15, 16, 17}, {16, 17, 16},  {17, 33, 47},   {31, 48, 65},
                         {32, 64, 64}, {33, 49, 96}, {48, 31, 33}, {200, 40, 33}, {33, 40, 1100}, {18, 1100, 40}};

template <class Fn>
void for_products(Fn&& fn) {
  for (const Product& product : kProducts)
    for (const WeightFormat format : formats_of(product))
      for (const Shape& shape : kShapes) fn(product, format, shape);
}

// Runs a row on a problem of its own and returns what the model counted. Panels come kMaxTaskPanels at a time.
TileCounts counts_of(const Product& product, WeightFormat format, const Shape& shape) {
  Random random(3);
  Problem problem(format, shape, random, Values::kReals);
  TileOpModel::release();
  TileOpModel::state().counts = {};
  int64_t ldc = 0;
  problem.run(model_row(product), false, &ldc);
  return TileOpModel::state().counts;
}

// What a product may do. Dot products: exactly the tiles of the problem. Tile loads: one per dot product where blocks are
// 2 x 2; a block at an edge with r x c tiles needs r + c loads for r c dot products; sums that go on in another pass (16
// steps) are loaded again.
struct Gate {
  int64_t dots, loads, reloads;
  bool whole_blocks;
  std::string where;
};

Gate gate_of(const Product& product, WeightFormat format, const Shape& shape) {
  const bool forward = product.direction == Direction::kForward, groups = format.kind == Format::kInt4;
  const int64_t step_k = product.rows == Rows::kBf16 ? 32 : groups ? min_i64(64, format.group) : 64;
  const int64_t m = ceil_div(shape.m, 16), cols = ceil_div(forward ? shape.n : shape.k, 16);
  const int64_t steps = ceil_div(forward ? shape.k : shape.n, step_k);
  const bool sums_in_tiles = product.rows == Rows::kBf16 || !groups;
  Gate gate{m * cols * steps, 0, sums_in_tiles ? (ceil_div(steps, 16) - 1) * m * cols : 0, m % 2 == 0 && cols % 2 == 0,
            std::string(product.amx_row) + " group=" + std::to_string(format.group) + " m=" + std::to_string(shape.m) +
                " n=" + std::to_string(shape.n) + " k=" + std::to_string(shape.k)};
  gate.loads = steps * (ceil_div(m, 2) * cols + m * ceil_div(cols, 2)) + gate.reloads;
  return gate;
}

void expect_gate(const Gate& gate, int64_t dots, int64_t loads, int64_t configures) {
  KTS_EXPECT(dots == gate.dots) << gate.where << ": " << dots << " dot products, not " << gate.dots;
  KTS_EXPECT(loads == gate.loads) << gate.where << ": " << loads << " tile loads, not " << gate.loads;
  KTS_EXPECT(!gate.whole_blocks || loads - gate.reloads <= dots) << gate.where << ": more loads than dot products";
  KTS_EXPECT(configures == 1) << gate.where << ": configured " << configures << " times";
}

}  // namespace

KTS_TEST(tile_model_is_exact_on_small_integers) {
  for_products([](const Product& product, WeightFormat format, const Shape& shape) {
    const KernelRow row = model_row(product);
    check_row(row, format, shape, Values::kSmallIntegers, may_accumulate(row) && shape.m % 2 == 0);
  });
}

KTS_TEST(tile_model_meets_the_bound_on_reals) {
  for_products([](const Product& product, WeightFormat format, const Shape& shape) {
    const KernelRow row = model_row(product);
    check_row(row, format, shape, Values::kReals, may_accumulate(row) && shape.m % 2 == 1);
  });
}

KTS_TEST(tile_model_of_int8_rows_equals_the_scalar_bits) {
  for_products([](const Product& product, WeightFormat format, const Shape& shape) {
    if (product.rows != Rows::kInt8) return;
    Random random(4);
    Problem problem(format, shape, random, Values::kReals);
    int64_t ldc = 0;
    const KernelRow& reference =
        select_gemm({format.kind, Rows::kInt8, Direction::kForward, shape.m, shape.n, shape.k}, kScalar);
    const std::vector<float> want = problem.run(reference, false, &ldc);
    const std::vector<float> got = problem.run(model_row(product), false, &ldc);
    KTS_EXPECT(std::memcmp(want.data(), got.data(), want.size() * sizeof(float)) == 0)
        << product.amx_row << " group=" << format.group << " m=" << shape.m << " n=" << shape.n << " k=" << shape.k;
  });
}

KTS_TEST(tile_counts_pass_the_gates) {
  for_products([](const Product& product, WeightFormat format, const Shape& shape) {
    const TileCounts counts = counts_of(product, format, shape);
    const Gate gate = gate_of(product, format, shape);
    expect_gate(gate, counts.dots, counts.loads, counts.configures);
    KTS_EXPECT(counts.faults == 0) << gate.where;
  });
}

// The same gates for the shipped machine code. The tiles are given up before each product: one phase.
KTS_TEST(emulated_counts_pass_the_gates) {
  if (&kts_emulator_counts == nullptr || !(detect_isa() & kAmxBf16)) KTS_SKIP("no instruction emulator");
  for_products([](const Product& product, WeightFormat format, const Shape& shape) {
    for (const KernelRow& row : kernel_table()) {
      if (std::strcmp(row.name, product.amx_row) != 0) continue;
      Random random(3);
      Problem problem(format, shape, random, Values::kReals);
      gemm_end_phase();
      const KtsEmulatorCounts before = kts_emulator_counts;
      int64_t ldc = 0;
      problem.run(row, false, &ldc);
      const KtsEmulatorCounts& now = kts_emulator_counts;
      expect_gate(gate_of(product, format, shape), now.tdpbf16ps + now.tdpbssd - before.tdpbf16ps - before.tdpbssd,
                  now.tileloadd - before.tileloadd, now.ldtilecfg - before.ldtilecfg);
    }
  });
}

KTS_TEST(tiles_must_be_configured_after_a_release) {
  TileOpModel::release();
  TileOpModel::state().counts = {};
  TileOpModel::zero<0>();
  KTS_EXPECT(TileOpModel::state().counts.faults == 1);
}

KTS_TEST(tile_nest_refuses_a_broken_task) {
  for (const Product& product : kProducts) {
    bool refused = false;
    try {
      product.model(GemmTask{});
    } catch (const std::logic_error& error) {
      refused = std::strstr(error.what(), "broken contract: task.w") != nullptr;
    }
    KTS_EXPECT(refused) << product.amx_row;
  }
}

// Small shapes only: the model is slow where this runs in an emulated PC.
KTS_TEST(tile_model_equals_the_instructions) {
  int64_t compared = 0;
  for_products([&](const Product& product, WeightFormat format, const Shape& shape) {
    if (shape.m * shape.n * shape.k > 200000) return;
    for (const KernelRow& row : kernel_table()) {
      if (std::strcmp(row.name, product.amx_row) != 0 || (detect_isa() & row.isa) == 0) continue;
      ++compared;
      Random random(9);
      Problem problem(format, shape, random, Values::kReals);
      int64_t ldc = 0;
      const std::vector<float> model = problem.run(model_row(product), false, &ldc),
                               real = problem.run(row, false, &ldc);
      gemm_end_phase();
      double difference = 0, norm = 0;
      for (size_t i = 0; i < model.size(); ++i) {
        difference += std::pow(static_cast<double>(model[i]) - real[i], 2);
        norm += std::pow(static_cast<double>(model[i]), 2);
      }
      const double bound = product.rows == Rows::kInt8 ? 0.0 : 1e-12 * norm;
      KTS_EXPECT(difference <= bound) << row.name << " m=" << shape.m << " n=" << shape.n << " k=" << shape.k;
    }
  });
  if (compared == 0) KTS_SKIP("this CPU has no AMX");
}

}  // namespace kts::test
