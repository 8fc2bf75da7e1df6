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
void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                 emulator::Place place = emulator::here()) {
  struct Lane {
    uint32_t a[4], b[2];
  } mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, all[32];
  emulator::exchange(&mine, sizeof mine, 0, 32, all, place);
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, col = lane % 4 * 2 + i % 2;
    float sum = c[i];
    for (int k = 0; k < 16; ++k) {
      const uint32_t x = all[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2];
      const uint32_t y = all[col * 4 + k % 8 / 2].b[k / 8];
      sum += half_of(x, k % 2, T()) * half_of(y, k % 2, T());
    }
    c[i] = sum;
  }
}

}  // namespace fastlm
