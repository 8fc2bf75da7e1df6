// The activations and their slopes on vectors. Included by the kernel files, inside the set's
// namespace, after "ops/activation_kind.h" outside of it.

// The normal distribution below x, given gauss = e^(-x^2 / 2). The tail beyond |x| is
// gauss / 2 * erfcx(|x| / sqrt 2), with erfcx(z) a polynomial in t = 1 / (1 + z / 2) (least
// squares, relative error 4e-8 in exact arithmetic); within 1.5e-7.
template <class V>
FASTLM_WORD V normal_below(V x, V gauss) {
  const V t = set1(1.0f) / fma(vabs(x), set1(0.35355339059327376f), set1(1.0f));
  const V tt = t * t;  // even and odd powers side by side: half the way to wait for
  V p = fma(set1(-0.05906902253627777f), tt, set1(-0.4872004985809326f));
  V odd = fma(set1(0.2845752537250519f), tt, set1(0.27806779742240906f));
  p = fma(p, tt, set1(-0.026626085862517357f));
  odd = fma(odd, tt, set1(0.20268703997135162f));
  p = fma(p, tt, set1(0.2431037276983261f));
  odd = fma(odd, tt, set1(0.282375305891037f));
  p = fma(p, tt, set1(0.28208643198013306f));
  p = fma(odd, t, p);
  const V tail = set1(0.5f) * gauss * (p * t);
  return select(less(x, zero()), tail, set1(1.0f) - tail);
}
// The same for fp32's sake: near zero 1 - tail has errors of 3e-8 that 1/2 + x q(x^2) has not.
template <class V>
FASTLM_WORD V normal_below_fine(V x, V gauss) {
  const V z = x * x;
  V q = fma(set1(9.435095787730553e-05f), z, set1(-0.0011695865757996918f));
  q = fma(q, z, set1(0.00996734369473397f));
  q = fma(q, z, set1(-0.06648961246954653f));
  q = fma(q, z, set1(0.3989422651689082f));
  return select(less(vabs(x), set1(1.0f)), fma(q, x, set1(0.5f)), normal_below(x, gauss));
}
// e^(-x^2 / 2), whose error grows with x^2 while it shrinks.
template <class V>
FASTLM_WORD V gauss(V x) {
  return vexp2_falling<6>(at_least(-150.0f, x * x * set1(-0.72134752044448170f)));
}

// What gelu_tanh takes the sigmoid of: (1 + tanh u) / 2 is the sigmoid of 2 u, 2 u = x (a + b x^2).
constexpr float kTanhA = 1.5957691216057308f, kTanhB = 0.07135481627260025f;

// s = 1 / (1 + e^-x) and *rest = 1 - s, both without cancellation.
template <class V>
FASTLM_WORD V sigmoid_parts(V x, V* rest) {
  const V e = vexp(vmin(set1(80.0f), zero() - x));  // finite, so that e * s has no 0 * infinity
  const V s = set1(1.0f) / (set1(1.0f) + e);
  *rest = e * s;
  return s;
}

// y = act(x); kFine: for results that are not rounded to 16 bits
template <Activation kAct, bool kFine = true, class V>
FASTLM_WORD V activate(V x) {
  if constexpr (kAct == Activation::kSilu) return x * vsigmoid(x);
  if constexpr (kAct == Activation::kGelu) {
    return x * (kFine ? normal_below_fine(x, gauss(x)) : normal_below(x, gauss(x)));
  }
  if constexpr (kAct == Activation::kGeluTanh) {
    return x * vsigmoid(x * fma(x * x, set1(kTanhB), set1(kTanhA)));
  }
  if constexpr (kAct == Activation::kRelu) return vmax(zero(), x);  // NaN comes through
  if constexpr (kAct == Activation::kRelu2) {
    const V y = vmax(zero(), x);
    return y * y;
  }
}

// act'(x), and act(x) with it
template <Activation kAct, class V>
FASTLM_WORD V activate_slope(V x, V* y) {
  if constexpr (kAct == Activation::kSilu) {
    V rest;
    const V s = sigmoid_parts(x, &rest);
    *y = x * s;
    return s * fma(x, rest, set1(1.0f));
  }
  if constexpr (kAct == Activation::kGelu) {
    const V g = gauss(x), below = normal_below(x, g);
    *y = x * below;
    return fma(x * set1(0.39894228040143268f), g, below);
  }
  if constexpr (kAct == Activation::kGeluTanh) {
    const V t = x * x;
    V rest;
    const V s = sigmoid_parts(x * fma(t, set1(kTanhB), set1(kTanhA)), &rest);
    *y = x * s;
    return fma(*y * rest, fma(t, set1(3.0f * kTanhB), set1(kTanhA)), s);
  }
  if constexpr (kAct == Activation::kRelu) {
    *y = vmax(zero(), x);
    return select(less(zero(), x), set1(1.0f), zero());
  }
  if constexpr (kAct == Activation::kRelu2) {
    const V r = vmax(zero(), x);
    *y = r * r;
    return r + r;
  }
}
