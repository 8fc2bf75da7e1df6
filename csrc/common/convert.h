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

static inline float to_float(fp16 x) {  // exact, denormals included
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t rest = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  uint32_t bits = rest + 0x38000000u;
  float value;
  if (rest >= 0x0f800000u) bits = rest | 0x7f800000u;  // infinity, NaN
  __builtin_memcpy(&value, &bits, sizeof value);
  if (rest < 0x00800000u) value = static_cast<float>(x.bits & 0x7fffu) * 0x1p-24f;
  __builtin_memcpy(&bits, &value, sizeof bits);
  bits |= sign;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}
static inline void from_float(float x, fp16* out) {  // to nearest even
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000u;
  bits &= 0x7fffffffu;
  uint32_t half;
  if (bits > 0x7f800000u) {
    half = 0x7e00u;
  } else if (bits >= 0x477ff000u) {
    half = 0x7c00u;
  } else if (bits < 0x38800000u) {
    float magnitude;
    __builtin_memcpy(&magnitude, &bits, sizeof magnitude);
    magnitude += 0.5f;  // lines the denormal's last bit up with the float's
    uint32_t shifted;
    __builtin_memcpy(&shifted, &magnitude, sizeof shifted);
    half = shifted - 0x3f000000u;
  } else {
    half = (bits + 0xfffu + (bits >> 13 & 1) - 0x38000000u) >> 13;
  }
  out->bits = static_cast<uint16_t>(half | sign);
}

}  // namespace fastlm
