#pragma once
#include "emulator.h"

struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  float value = exponent == 0    ? ldexpf(fraction, -24)
                : exponent == 31 ? (fraction == 0 ? INFINITY : NAN)
                                 : ldexpf(1024 + fraction, exponent - 25);
  return x.bits >> 15 ? -value : value;
}

inline __half __float2half_rn(float x) {
  const int sign = signbit(x) ? 0x8000 : 0;
  if (x != x) return {0x7fff};
  if (fabsf(x) >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  const int exponent = fabsf(x) < 0x1p-14f ? -14 : ilogbf(x);
  const int fraction = static_cast<int>(nearbyintf(ldexpf(fabsf(x), 10 - exponent)));
  return {static_cast<uint16_t>(sign + (exponent + 14) * 1024 + fraction)};
}
