// The activations and their slopes on vectors. Included by the kernel files, inside the set's
// namespace, after "ops/activation_kind.h" outside of it.

// The normal distribution below x, given gauss = e^(-x^2 / 2). The tail beyond |x| is
// gauss / 2 * erfcx(|x| / sqrt 2), with erfcx(z) a polynomial in t = 1 / (1 + z / 2) (least
// squares, relative error 4e-8 in exact arithmetic); within 1.5e-7.
FASTLM_WORD VecF normal_below(VecF x, VecF gauss) {
  const VecF t = set1(1.0f) / fma(vabs(x), set1(0.35355339059327376f), set1(1.0f));
  VecF p = set1(-0.05906902253627777f);
  p = fma(p, t, set1(0.2845752537250519f));
  p = fma(p, t, set1(-0.4872004985809326f));
  p = fma(p, t, set1(0.27806779742240906f));
  p = fma(p, t, set1(-0.026626085862517357f));
  p = fma(p, t, set1(0.20268703997135162f));
  p = fma(p, t, set1(0.2431037276983261f));
  p = fma(p, t, set1(0.282375305891037f));
  p = fma(p, t, set1(0.28208643198013306f));
  const VecF tail = set1(0.5f) * gauss * (p * t);
  return select(less(x, zero()), tail, set1(1.0f) - tail);
}
// The same for fp32's sake: near zero 1 - tail has errors of 3e-8 that 1/2 + x q(x^2) has not.
FASTLM_WORD VecF normal_below_fine(VecF x, VecF gauss) {
  const VecF z = x * x;
  VecF q = set1(9.435095787730553e-05f);
  q = fma(q, z, set1(-0.0011695865757996918f));
  q = fma(q, z, set1(0.00996734369473397f));
  q = fma(q, z, set1(-0.06648961246954653f));
  q = fma(q, z, set1(0.3989422651689082f));
  return select(less(vabs(x), set1(1.0f)), fma(q, x, set1(0.5f)), normal_below(x, gauss));
}
FASTLM_WORD VecF gauss(VecF x) { return vexp(x * x * set1(-0.5f)); }

// What gelu_tanh takes the sigmoid of: (1 + tanh u) / 2 is the sigmoid of 2 u, 2 u = x (a + b x^2).
constexpr float kTanhA = 1.5957691216057308f, kTanhB = 0.07135481627260025f;

// s = 1 / (1 + e^-x) and *rest = 1 - s, both without cancellation.
FASTLM_WORD VecF sigmoid_parts(VecF x, VecF* rest) {
  const VecF e = vexp(vmin(set1(80.0f), zero() - x));  // finite, so that e * s has no 0 * infinity
  const VecF s = set1(1.0f) / (set1(1.0f) + e);
  *rest = e * s;
  return s;
}

// y = act(x); kFine: for results that are not rounded to 16 bits
template <Activation kAct, bool kFine = true>
FASTLM_WORD VecF activate(VecF x) {
  if constexpr (kAct == Activation::kSilu) return x * vsigmoid(x);
  if constexpr (kAct == Activation::kGelu) {
    return x * (kFine ? normal_below_fine(x, gauss(x)) : normal_below(x, gauss(x)));
  }
  if constexpr (kAct == Activation::kGeluTanh) {
    return x * vsigmoid(x * fma(x * x, set1(kTanhB), set1(kTanhA)));
  }
  if constexpr (kAct == Activation::kRelu) return vmax(zero(), x);  // NaN comes through
  if constexpr (kAct == Activation::kRelu2) {
    const VecF y = vmax(zero(), x);
    return y * y;
  }
}

// act'(x), and act(x) with it
template <Activation kAct>
FASTLM_WORD VecF activate_slope(VecF x, VecF* y) {
  if constexpr (kAct == Activation::kSilu) {
    VecF rest;
    const VecF s = sigmoid_parts(x, &rest);
    *y = x * s;
    return s * fma(x, rest, set1(1.0f));
  }
  if constexpr (kAct == Activation::kGelu) {
    const VecF g = gauss(x), below = normal_below(x, g);
    *y = x * below;
    return fma(x * set1(0.39894228040143268f), g, below);
  }
  if constexpr (kAct == Activation::kGeluTanh) {
    const VecF t = x * x;
    VecF rest;
    const VecF s = sigmoid_parts(x * fma(t, set1(kTanhB), set1(kTanhA)), &rest);
    *y = x * s;
    return fma(*y * rest, fma(t, set1(3.0f * kTanhB), set1(kTanhA)), s);
  }
  if constexpr (kAct == Activation::kRelu) {
    *y = vmax(zero(), x);
    return select(less(zero(), x), set1(1.0f), zero());
  }
  if constexpr (kAct == Activation::kRelu2) {
    const VecF r = vmax(zero(), x);
    *y = r * r;
    return r + r;
  }
}
