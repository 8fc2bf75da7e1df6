// Elementary functions on vectors. Included by target.cpp after simd.h.
#include "cpu/two.h"

// What pow2 makes of a large negative power is 0 on narrow vectors; AVX-512's would keep a NaN that
// came of -inf.
template <class V>
FASTLM_WORD V at_least(float low, V x) {
  if constexpr (kLanes == 16) return vmax(set1(low), x);  // operand order: a NaN in x comes through
  return x;
}

// e^x. Cody-Waite reduction x = n ln 2 + r, |r| <= ln 2 / 2, degree-6 polynomial (Cephes expf);
// at most 1 ulp off; 0 below -87.6 (AVX-512: -104), +inf above 88.37 (88.73), NaN stays NaN. The
// polynomial's halves are summed side by side: what waits for it waits for every step.
template <class V>
FASTLM_WORD V vexp(V x) {
  x = vmin(set1(89.0f), at_least(-104.0f, x));  // operand order: a NaN in x comes through
  const V n = vround(x * set1(1.44269504088896341f));
  V r = fma(n, set1(-0.693359375f), x);
  r = fma(n, set1(2.12194440e-4f), r);
  const V rr = r * r;
  V p = fma(set1(1.9875691500e-4f), r, set1(1.3981999507e-3f));
  p = fma(p, rr, fma(set1(8.3334519073e-3f), r, set1(4.1665795894e-2f)));
  p = fma(p, rr, fma(set1(1.6666665459e-1f), r, set1(5.0000001201e-1f)));
  p = fma(p, rr, r) + set1(1.0f);
  return pow2(p, n);
}

// 2^f on [-1/2, 1/2]: minimax polynomials, degree 6 good to 2e-9 relative, degree 5 to 8e-8.
template <int kDegree, class V>
FASTLM_WORD V vpow2_fraction(V f) {
  static_assert(kDegree == 5 || kDegree == 6);
  V p;
  if constexpr (kDegree == 6) {
    p = fma(set1(1.5345810375e-4f), f, set1(1.3399931206e-3f));
    p = fma(p, f, set1(9.6184889632e-3f));
    p = fma(p, f, set1(5.5503287770e-2f));
    p = fma(p, f, set1(2.4022646891e-1f));
    p = fma(p, f, set1(6.9314720574e-1f));
  } else {
    p = fma(set1(1.3276470118e-3f), f, set1(9.6755413195e-3f));
    p = fma(p, f, set1(5.5507132793e-2f));
    p = fma(p, f, set1(2.4022119724e-1f));
    p = fma(p, f, set1(6.9314696706e-1f));
  }
  return fma(p, f, set1(1.0f));
}

// e^x for x <= 0, as a softmax needs it: one step of reduction, whose error grows with |x| while
// the result shrinks as e^x. About half the cost of vexp; good for x <= 88 too.
template <int kDegree, class V>
FASTLM_WORD V vexp_falling(V x) {
  const VecF log2e = set1(1.44269504088896341f);
  x = at_least(-104.0f, x);
  const V n = vround(x * log2e);
  return pow2(vpow2_fraction<kDegree>(fma(x, log2e, zero() - n)), n);
}

// 2^y for y <= 127; at_least(-150, y) where it may be -inf.
template <int kDegree, class V>
FASTLM_WORD V vexp2_falling(V y) {
  const V n = vround(y);
  return pow2(vpow2_fraction<kDegree>(y - n), n);
}

// 1 / (1 + e^-x)
template <class V>
FASTLM_WORD V vsigmoid(V x) {
  return set1(1.0f) / (set1(1.0f) + vexp(zero() - x));
}

// tanh x: Cephes' polynomial near zero, exponentials beyond. *slope = 1 - tanh^2, beyond from the
// exponential too: of a tanh rounded to nearly one nothing is left.
FASTLM_WORD VecF vtanh(VecF x, VecF* slope) {
  const VecF size = vabs(x), z = x * x, one = set1(1.0f);
  VecF p = set1(-5.70498872745e-3f);
  p = fma(p, z, set1(2.06390887954e-2f));
  p = fma(p, z, set1(-5.37397155531e-2f));
  p = fma(p, z, set1(1.33314422036e-1f));
  p = fma(p, z, set1(-3.33332819422e-1f));
  const VecF near = fma(p * z, x, x);
  const VecF e = vexp_falling<6>(set1(-2.0f) * size);
  const VecF rest = (e + e) / (one + e), far = one - rest;  // tanh |x| = 1 - rest
  const VecF signed_far = select(less(x, zero()), zero() - far, far);
  const auto is_near = less(size, set1(0.625f));
  *slope = select(is_near, one - near * near, rest * (one + far));
  return select(is_near, near, signed_far);
}
FASTLM_WORD VecF vtanh(VecF x) {
  VecF slope;
  return vtanh(x, &slope);
}
