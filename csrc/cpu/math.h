// Elementary functions on vectors. Included by target.cpp after simd.h.

// e^x. Cody-Waite reduction x = n ln 2 + r, |r| <= ln 2 / 2, degree-6 polynomial (Cephes expf);
// at most 1 ulp off; 0 below -104, +inf above 88.73, NaN stays NaN.
inline VecF vexp(VecF x) {
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

// 1 / (1 + e^-x)
inline VecF vsigmoid(VecF x) { return set1(1.0f) / (set1(1.0f) + vexp(zero() - x)); }
