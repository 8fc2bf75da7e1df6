// Stands in for csrc/cuda/mma.cuh: the same products, lane by lane.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace fastlm {

inline float half_of(uint32_t pair, int which, __nv_bfloat16) {
  return __bfloat162float({static_cast<uint16_t>(pair >> 16 * which)});
}
inline float half_of(uint32_t pair, int which, __half) {
  return __half2float({static_cast<uint16_t>(pair >> 16 * which)});
}

template <class T>
uint32_t pack(float low, float high) {
  T pair[2];
  uint32_t bits;
  if constexpr (__is_same(T, __half)) {
    pair[0] = __float2half_rn(low), pair[1] = __float2half_rn(high);
  } else {
    pair[0] = __float2bfloat16_rn(low), pair[1] = __float2bfloat16_rn(high);
  }
  __builtin_memcpy(&bits, pair, sizeof bits);
  return bits;
}

template <class T>
uint32_t difference(uint32_t a, uint32_t b) {
  return pack<T>(half_of(a, 0, T()) - half_of(b, 0, T()), half_of(a, 1, T()) - half_of(b, 1, T()));
}

template <class T>
void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                 emulator::Place place = emulator::here()) {
  float mine[12];  // as emulator::multiply wants them
  for (int i = 0; i < 12; ++i) mine[i] = half_of(i < 8 ? a[i / 2] : b[i / 2 - 4], i % 2, T());
  emulator::multiply(mine, c, place);
}

}  // namespace fastlm
