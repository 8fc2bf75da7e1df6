// Elementary functions on vectors. Included by target.cpp after simd.h.

// e^x. Cody-Waite reduction x = n ln 2 + r, |r| <= ln 2 / 2, degree-6 polynomial (Cephes expf);
// at most 1 ulp off; 0 below -104, +inf above 88.73, NaN stays NaN.
FASTLM_WORD VecF vexp(VecF x) {
  const VecF low = set1(-104.0f), high = set1(89.0f);
  x = vmin(high, vmax(low, x));  // operand order: a NaN in x comes through
  const VecF n = vround(x * set1(1.44269504088896341f));
  VecF r = fma(n, set1(-0.693359375f), x);
  r = fma(n, set1(2.12194440e-4f), r);
  VecF p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, r * r, r) + set1(1.0f);
  return pow2(p, n);
}

// 2^f on [-1/2, 1/2]: minimax polynomials, degree 6 good to 2e-9 relative, degree 5 to 8e-8.
template <int kDegree>
FASTLM_WORD VecF vpow2_fraction(VecF f) {
  static_assert(kDegree == 5 || kDegree == 6);
  VecF p;
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
template <int kDegree>
FASTLM_WORD VecF vexp_falling(VecF x) {
  const VecF log2e = set1(1.44269504088896341f);
  x = vmax(set1(-104.0f), x);  // operand order: a NaN in x comes through
  const VecF n = vround(x * log2e);
  return pow2(vpow2_fraction<kDegree>(fma(x, log2e, zero() - n)), n);
}

// 2^y for finite y <= 127.
template <int kDegree>
FASTLM_WORD VecF vexp2_falling(VecF y) {
  if constexpr (kLanes != 16) y = vmax(set1(-150.0f), y);  // AVX-512 scales by any power
  const VecF n = vround(y);
  return pow2(vpow2_fraction<kDegree>(y - n), n);
}

// 1 / (1 + e^-x)
FASTLM_WORD VecF vsigmoid(VecF x) { return set1(1.0f) / (set1(1.0f) + vexp(zero() - x)); }

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
