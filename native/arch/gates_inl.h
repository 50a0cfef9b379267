// Gate functions of the experts, h = f(gate, up), and their derivatives, written once on Vec (arch/vec_*.h). Every one
// carries a NaN through. Include only from elementwise_<isa>.cc, by way of elementwise_inl.h, and from tests.
#pragma once
#include "kts/elementwise.h"

namespace kts {

// exp(x), about 1 ulp over the finite range: x = n ln 2 + r, |r| <= ln 2 / 2; the degree-6 polynomial for exp(r) is
// Cephes' expf (S. L. Moshier, netlib.org/cephes). NaN passes through because min and max return their second operand
// then.
template <class V>
KTS_INLINE typename V::F exp_f32(typename V::F x) {
  using F = typename V::F;
  const F clamped = V::max(V::set1(-87.0f), V::min(V::set1(88.0f), x));
  const F n = V::round_even(V::mul(clamped, V::set1(1.44269504088896341f)));
  F r = V::fma(n, V::set1(-0.693359375f), clamped);
  r = V::fma(n, V::set1(2.12194440e-4f), r);
  F p = V::set1(1.9875691500e-4f);
  p = V::fma(p, r, V::set1(1.3981999507e-3f));
  p = V::fma(p, r, V::set1(8.3334519073e-3f));
  p = V::fma(p, r, V::set1(4.1665795894e-2f));
  p = V::fma(p, r, V::set1(1.6666665459e-1f));
  p = V::fma(p, r, V::set1(5.0000001201e-1f));
  p = V::fma(V::mul(r, r), p, V::add(r, V::set1(1.0f)));
  return V::mul(p, V::pow2(n));
}

template <class V>
KTS_INLINE typename V::F sigmoid_f32(typename V::F x) {
  return V::div(V::set1(1.0f), V::add(V::set1(1.0f), exp_f32<V>(V::sub(V::zero(), x))));
}

// value = g sigmoid(g); slope = sigmoid(g) (1 + g (1 - sigmoid(g)))
template <class V>
struct Silu {
  using F = typename V::F;
  KTS_INLINE F value(F g) { return V::mul(g, sigmoid_f32<V>(g)); }
  KTS_INLINE void value_and_slope(F g, F* value, F* slope) {
    const F s = sigmoid_f32<V>(g);
    *value = V::mul(g, s);
    *slope = V::mul(s, V::fma(g, V::sub(V::set1(1.0f), s), V::set1(1.0f)));
  }
};

// value = g P(g), slope = P(g) + g p(g), where p and P are density and distribution of the standard normal.
//   tail = P(-|g|) = exp(-g^2 / 2) erfcx(t) / 2, t = |g| / sqrt 2
// keeps its relative accuracy far below zero, where 1 + erf would cancel. erfcx(t) (1 + 2 t) is a polynomial in
// q = (t - 2) / (t + 2), as M. M. Shepherd and J. G. Laframboise (Math. Comp. 36, 1981) propose; the coefficients are a
// minimax fit of degree 9 up to t = 9.6, relative error 1.1e-8. The rounding error of g^2 is put back.
template <class V>
struct Gelu {
  using F = typename V::F;
  KTS_INLINE F magnitude(F g) { return V::max(V::sub(V::zero(), g), g); }
  // exp(-g^2 / 2)
  KTS_INLINE F bell(F g) {
    const F square = V::mul(g, g), half = V::set1(-0.5f);
    const F error = V::fma(g, g, V::sub(V::zero(), square));
    const F e = exp_f32<V>(V::mul(half, square));
    // Beyond |g| = 13 the bell is below 1e-36, and the square of a large g overflows.
    return V::select_gt(magnitude(g), V::set1(13.0f), V::zero(), V::fma(V::mul(half, error), e, e));
  }
  KTS_INLINE F tail(F size, F bell) {
    const F two = V::set1(2.0f), t = V::min(V::set1(9.6f), V::mul(size, V::set1(0.70710678118654752f)));
    const F q = V::div(V::sub(t, two), V::add(t, two));
    F p = V::set1(-4.063621745e-04f);
    p = V::fma(p, q, V::set1(-1.239901176e-03f));
    p = V::fma(p, q, V::set1(1.314367168e-03f));
    p = V::fma(p, q, V::set1(8.639661595e-03f));
    p = V::fma(p, q, V::set1(-8.058407344e-03f));
    p = V::fma(p, q, V::set1(-5.420633405e-02f));
    p = V::fma(p, q, V::set1(1.640549451e-01f));
    p = V::fma(p, q, V::set1(-1.660312563e-01f));
    p = V::fma(p, q, V::set1(-9.276396036e-02f));
    p = V::fma(p, q, V::set1(1.276978374e+00f));
    return V::mul(V::mul(V::set1(0.5f), bell), V::div(p, V::fma(two, t, V::set1(1.0f))));
  }
  KTS_INLINE F normal(F g, F tail) { return V::select_gt(g, V::zero(), V::sub(V::set1(1.0f), tail), tail); }
  KTS_INLINE F value(F g) { return V::mul(g, normal(g, tail(magnitude(g), bell(g)))); }
  KTS_INLINE void value_and_slope(F g, F* value, F* slope) {
    const F e = bell(g), p = normal(g, tail(magnitude(g), e));
    *value = V::mul(g, p);
    *slope = V::fma(V::mul(g, V::set1(0.39894228040143268f)), e, p);
  }
};

// g (1 + tanh z) / 2 = g sigmoid(2 z), z = sqrt(2 / pi) (g + 0.044715 g^3)
template <class V>
struct GeluTanh {
  using F = typename V::F;
  static constexpr float kTwoZ = 1.5957691216057308f, kCubic = 0.044715f;
  KTS_INLINE F sigmoid(F g) {
    const F cubic = V::fma(V::mul(V::set1(kCubic), g), g, V::set1(1.0f));
    return sigmoid_f32<V>(V::mul(V::mul(V::set1(kTwoZ), g), cubic));
  }
  KTS_INLINE F value(F g) { return V::mul(g, sigmoid(g)); }
  KTS_INLINE void value_and_slope(F g, F* value, F* slope) {
    const F s = sigmoid(g);
    const F dz = V::mul(V::set1(kTwoZ), V::fma(V::mul(V::set1(3.0f * kCubic), g), g, V::set1(1.0f)));
    *value = V::mul(g, s);
    *slope = V::mul(s, V::fma(V::mul(g, V::sub(V::set1(1.0f), s)), dz, V::set1(1.0f)));
  }
};

template <class V>
struct Relu {
  using F = typename V::F;
  KTS_INLINE F value(F g) { return V::max(V::zero(), g); }
  KTS_INLINE void value_and_slope(F g, F* value, F* slope) {
    *value = Relu::value(g);
    *slope = V::select_gt(V::zero(), g, V::zero(), V::select_gt(g, V::zero(), V::set1(1.0f), g));  // 0 at 0, NaN at NaN
  }
};

// h = act(g) u
template <class V, template <class> class Act>
struct Glu {
  using F = typename V::F;
  KTS_INLINE F forward(const GateParams&, F g, F u) { return V::mul(Act<V>::value(g), u); }
  // What the tape keeps of g and u, before rounding.
  KTS_INLINE void for_tape(const GateParams&, F*, F*) {}
  // h, and the gradients of g and u for a gradient dh of h.
  KTS_INLINE void backward(const GateParams&, F g, F u, F dh, F* h, F* dg, F* du) {
    F value, slope;
    Act<V>::value_and_slope(g, &value, &slope);
    *h = V::mul(value, u);
    *dg = V::mul(V::mul(dh, u), slope);
    *du = V::mul(dh, value);
  }
};

// h = (u' + 1) g' sigmoid(alpha g'), g' = min(g, limit), u' = u cut to -limit .. limit; beyond the limits the gradient
// is zero, at them it is not.
template <class V>
struct ClampedSwiglu {
  using F = typename V::F;
  KTS_INLINE F up_plus_one(const GateParams& p, F u) {
    return V::add(V::max(V::set1(-p.limit), V::min(V::set1(p.limit), u)), V::set1(1.0f));
  }
  KTS_INLINE F forward(const GateParams& p, F g, F u) {
    const F cut = V::min(V::set1(p.limit), g);
    return V::mul(V::mul(cut, sigmoid_f32<V>(V::mul(V::set1(p.alpha), cut))), up_plus_one(p, u));
  }
  // Rounding to f16 must not move a number across a limit, where the gradient jumps: what is cut off is kept as a number
  // clearly beyond the limit. Limits are f16 numbers themselves, so the others stay inside.
  KTS_INLINE void for_tape(const GateParams& p, F* g, F* u) {
    const F limit = V::set1(p.limit), beyond = V::set1(p.limit * 1.25f);
    *g = V::select_gt(*g, limit, beyond, *g);
    *u = V::select_gt(*u, limit, beyond, V::select_gt(V::set1(-p.limit), *u, V::set1(-p.limit * 1.25f), *u));
  }
  KTS_INLINE void backward(const GateParams& p, F g, F u, F dh, F* h, F* dg, F* du) {
    const F limit = V::set1(p.limit), zero = V::zero(), cut = V::min(limit, g), scaled = V::mul(V::set1(p.alpha), cut);
    const F plus_one = up_plus_one(p, u), s = sigmoid_f32<V>(scaled), value = V::mul(cut, s);
    const F slope = V::mul(s, V::fma(scaled, V::sub(V::set1(1.0f), s), V::set1(1.0f)));
    *h = V::mul(value, plus_one);
    *dg = V::select_gt(g, limit, zero, V::mul(V::mul(dh, plus_one), slope));
    *du = V::select_gt(u, limit, zero, V::select_gt(V::set1(-p.limit), u, zero, V::mul(dh, value)));
  }
};

template <class V>
using SiluGlu = Glu<V, Silu>;
template <class V>
using GeluGlu = Glu<V, Gelu>;
template <class V>
using GeluTanhGlu = Glu<V, GeluTanh>;
template <class V>
using ReluGlu = Glu<V, Relu>;

}  // namespace kts
