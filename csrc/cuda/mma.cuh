// Products of small matrices by a warp's tensor cores: fragments in registers.
//
// With g = lane / 4, c = lane % 4 and pairs of neighbours in one register, the lower half first:
//   A [16, 16]  a[0]: row g,     columns 2c, 2c + 1      a[1]: row g + 8, the same columns
//               a[2]: row g,     columns 2c + 8, 2c + 9  a[3]: row g + 8, these columns
//   B [16, 8]   b[0]: column g,  rows 2c, 2c + 1         b[1]: column g,  rows 2c + 8, 2c + 9
//   C [16, 8]   c[0], c[1]: row g, columns 2c, 2c + 1    c[2], c[3]: row g + 8
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace fastlm {

// Two neighbours as T, rounded to nearest even, in one register.
template <class T>
__device__ inline uint32_t pack(float low, float high) {
  uint32_t bits;
  if constexpr (__is_same(T, __half)) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  }
  return bits;
}

// a - b for two pairs of T at once, each rounded to nearest even.
template <class T>
__device__ inline uint32_t difference(uint32_t a, uint32_t b) {
  using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  Pair x, y;
  __builtin_memcpy(&x, &a, sizeof a);
  __builtin_memcpy(&y, &b, sizeof b);
  x = __hsub2(x, y);
  __builtin_memcpy(&a, &x, sizeof a);
  return a;
}

// C += A B, sums in fp32. All lanes of the warp must call it.
template <class T>
__device__ inline void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (__is_same(T, __half)) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7},"
        " {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7},"
        " {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

}  // namespace fastlm
