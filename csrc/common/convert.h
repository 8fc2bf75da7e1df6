// Scalar conversions. Internal linkage on purpose: an inline function shared by objects compiled
// for different instruction sets could be linked in the wrong one's version.
#pragma once
#include "dtype.h"

namespace fastlm {

// bfloat16 of x, to nearest even; NaN stays NaN.
static inline uint16_t bf16_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

static inline float to_float(float x) { return x; }
static inline float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

static inline void from_float(float x, float* out) { *out = x; }
static inline void from_float(float x, bf16* out) { out->bits = bf16_bits(x); }

}  // namespace fastlm
