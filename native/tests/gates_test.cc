// Gate functions against double precision: in f32 on one lane, and as the row operations of every level round them.
#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "../arch/gates_inl.h"
#include "../arch/vec_scalar.h"
#include "check.h"
#include "kts/tables.h"

namespace kts::test {
namespace {

struct Truth {
  double value, slope;
};

// Where exp leaves the range of f32, sigmoids end at 2^-126.
constexpr double kLeastSigmoid = 0x1p-125;

double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

Truth silu(double g, double alpha = 1.0) {
  const double s = sigmoid(alpha * g);
  return {g * s, s * (1 + alpha * g * (1 - s))};
}
Truth gelu(double g) {
  const double p = 0.5 * std::erfc(-g * M_SQRT1_2), density = std::exp(-0.5 * g * g) / std::sqrt(2 * M_PI);
  return {g * p, p + g * density};
}
Truth gelu_tanh(double g) {
  const double root = std::sqrt(2 / M_PI), s = sigmoid(2 * root * (g + 0.044715 * g * g * g));
  return {g * s, s * (1 + g * (1 - s) * 2 * root * (1 + 3 * 0.044715 * g * g))};
}
Truth relu(double g) { return {g > 0 ? g : 0, g > 0 ? 1.0 : 0.0}; }

struct Both {
  double h, dg, du;  // gradients for dh = 1
};
Both clamped_swiglu(double g, double u, const GateParams& p) {
  const double limit = p.limit, cut = std::fmin(g, limit), one_more = std::fmax(-limit, std::fmin(limit, u)) + 1;
  const Truth t = silu(cut, p.alpha);
  return {t.value * one_more, g <= limit ? one_more * t.slope : 0, std::fabs(u) <= limit ? t.value : 0};
}

using Plain = Truth (*)(double);
Truth plain_silu(double g) { return silu(g); }
constexpr Plain kPlain[] = {plain_silu, gelu, gelu_tanh, relu};  // in the order of Activation

Both truth(int act, double g, double u, const GateParams& p) {
  if (act == static_cast<int>(Activation::kClampedSwiglu)) return clamped_swiglu(g, u, p);
  const Truth t = kPlain[act](g);
  return {t.value * u, t.slope * u, t.value};
}

// Numbers from -12 to 12 and both zeros, close to each other near zero.
std::vector<float> sweep() {
  std::vector<float> all = {0.0f, -0.0f};
  for (float size = 1e-6f; size < 12.0f; size = size * 1.0017f + 1e-7f) all.push_back(size), all.push_back(-size);
  return all;
}

template <template <class> class Act>
void check_f32(Plain want, const std::function<double(double)>& argument) {
  using V = scalar::Vec;
  for (const float g : sweep()) {
    float value, slope;
    Act<V>::value_and_slope(g, &value, &slope);
    KTS_EXPECT(Act<V>::value(g) == value) << g;
    const Truth t = want(g);
    // Four ulp of the formula, and the rounding of exp's argument, which exp multiplies.
    const double ulp = 0x1p-23, bound = ulp * (4 + argument(g));
    KTS_EXPECT(std::fabs(value - t.value) <= bound * std::fabs(t.value) + kLeastSigmoid * std::fabs(g))
        << "value at " << g << ": " << value;
    // The slope is a difference of two terms of at most the size of value / g and of the argument times that.
    const double size = std::fmax(std::fabs(t.slope), g == 0 ? 0 : std::fabs(t.value / g) * (1 + std::fabs(g) + g * g));
    KTS_EXPECT(std::fabs(slope - t.slope) <= bound * size + kLeastSigmoid * 200) << "slope at " << g << ": " << slope;
  }
}

}  // namespace

KTS_TEST(activations_in_f32_are_within_a_few_ulp_of_double_precision) {
  check_f32<Silu>(plain_silu, [](double) { return 0.0; });
  check_f32<Gelu>(gelu, [](double) { return 0.0; });
  check_f32<GeluTanh>(gelu_tanh, [](double g) { return 1.6 * std::fabs(g + 0.045 * g * g * g); });
  check_f32<Relu>(relu, [](double) { return 0.0; });
}

KTS_TEST(gates_match_double_precision_within_their_rounding_on_every_isa) {
  const GateParams params{1.702f, 3.0f};
  std::vector<float> g = sweep();
  for (const float beside : {3.0f, 3.00001f, 2.99999f}) g.push_back(beside), g.push_back(-beside);
  const int64_t cols = static_cast<int64_t>(g.size());
  std::vector<float> u(g.size()), dh(g.size());
  for (size_t i = 0; i < g.size(); ++i)
    u[i] = static_cast<float>(i % 23) * 0.5f - 5.25f, dh[i] = 1.0f - (i % 3) * 0.75f;
  for (const RowOps* ops : {&scalar::kRowOps, &avx2::kRowOps, &avx512::kRowOps}) {
    if ((detect_isa() & ops->isa) == 0) continue;
    for (int act = 0; act < kNumActivations; ++act) {
      std::vector<f16_t> gt(g.size()), ut(g.size());
      std::vector<bf16_t> h(g.size()), dg(g.size()), du(g.size()), h2(g.size());
      ops->glu[act].forward(params, g.data(), u.data(), cols, gt.data(), ut.data(), h.data());
      const float dot =
          ops->glu[act].backward(params, gt.data(), ut.data(), dh.data(), 2.0f, cols, dg.data(), du.data(), h2.data());
      double want_dot = 0, size_dot = 0;
      for (size_t i = 0; i < g.size(); ++i) {
        // Half an ulp of bf16, and what f32 leaves of terms that cancel.
        const auto near = [](bf16_t got, double want, double size) {
          return std::fabs(bf16_to_f32(got) - want) <=
                 std::fabs(want) * 0x1p-8 * 1.001 + size * 0x1p-20 + kLeastSigmoid * 1e4;
        };
        const auto where = [&] {
          return std::string(isa_name(ops->isa)) + " " + kActivationNames[act] + " at " + std::to_string(g[i]) + ", " +
                 std::to_string(u[i]);
        };
        const Both before = truth(act, g[i], u[i], params);
        const double x = f16_to_f32(gt[i]), y = f16_to_f32(ut[i]);
        const Both t = truth(act, x, y, params);
        const double scale = std::fabs(dh[i]) * 2 * (std::fabs(y) + 1), size = scale * std::exp(-std::fmax(0, -x));
        KTS_EXPECT(near(h[i], before.h, 0)) << where() << ": h " << bf16_to_f32(h[i]);
        KTS_EXPECT(near(h2[i], t.h, 0)) << where() << ": h of backward " << bf16_to_f32(h2[i]);
        KTS_EXPECT(near(dg[i], 2 * dh[i] * t.dg, size)) << where() << ": dg " << bf16_to_f32(dg[i]);
        KTS_EXPECT(near(du[i], 2 * dh[i] * t.du, 0)) << where() << ": du " << bf16_to_f32(du[i]);
        want_dot += dh[i] * t.h, size_dot += std::fabs(dh[i] * t.h);
      }
      KTS_EXPECT(std::fabs(dot - want_dot) <= 1e-5 * size_dot) << isa_name(ops->isa) << " " << kActivationNames[act];
    }
  }
}

KTS_TEST(gates_carry_nan_and_stay_finite_far_out) {
  const float nan = std::nanf(""), inf = std::numeric_limits<float>::infinity();
  std::vector<float> g = {nan, 1.0f, 3e38f, -3e38f, 65504.0f, -65504.0f, -100.0f, inf};
  std::vector<float> u = {1.0f, nan, 0.5f, 0.5f, 0.5f, 0.5f, 0.5f, 0.5f}, dh(g.size(), 1.0f);
  const int64_t cols = static_cast<int64_t>(g.size());
  for (const RowOps* ops : {&scalar::kRowOps, &avx2::kRowOps, &avx512::kRowOps}) {
    if ((detect_isa() & ops->isa) == 0) continue;
    for (int act = 0; act < kNumActivations; ++act) {
      const auto where = [&] { return std::string(isa_name(ops->isa)) + " " + kActivationNames[act]; };
      std::vector<f16_t> gt(g.size()), ut(g.size());
      std::vector<bf16_t> h(g.size()), dg(g.size()), du(g.size()), h2(g.size());
      ops->glu[act].forward({}, g.data(), u.data(), cols, gt.data(), ut.data(), h.data());
      ops->glu[act].backward({}, gt.data(), ut.data(), dh.data(), 1.0f, cols, dg.data(), du.data(), h2.data());
      for (size_t i = 0; i < 2; ++i)
        KTS_EXPECT(std::isnan(bf16_to_f32(h[i])) && std::isnan(bf16_to_f32(h2[i]))) << where();
      KTS_EXPECT(std::isnan(bf16_to_f32(dg[0])) && std::isnan(bf16_to_f32(du[0]))) << where();
      for (size_t i = 2; i < 7; ++i) {
        const double want = truth(act, g[i], u[i], {}).h;
        KTS_EXPECT(std::fabs(bf16_to_f32(h[i]) - want) <=
                   std::fabs(want) * 0x1p-8 * 1.001 + kLeastSigmoid * 9 * std::fabs(g[i]))
            << where() << " h at " << g[i] << ": " << bf16_to_f32(h[i]);
        KTS_EXPECT(std::isfinite(bf16_to_f32(dg[i])) && std::isfinite(bf16_to_f32(du[i]))) << where() << " " << g[i];
      }
      KTS_EXPECT(act == static_cast<int>(Activation::kClampedSwiglu) || std::isinf(bf16_to_f32(h[7]))) << where();
    }
  }
}

}  // namespace kts::test
