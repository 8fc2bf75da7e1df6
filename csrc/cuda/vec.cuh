// A few neighbouring elements in registers, loaded and stored in 16-byte pieces.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace fastlm {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(int8_t x) { return x; }

__device__ inline void from_float(float x, float* out) { *out = x; }
__device__ inline void from_float(float x, __nv_bfloat16* out) { *out = __float2bfloat16_rn(x); }
__device__ inline void from_float(float x, __half* out) { *out = __float2half_rn(x); }

// Elements of T that fill one 16-byte access.
template <class T>
constexpr int kVector = 16 / sizeof(T);

// N elements kept as T, half the registers of fp32 where T is bf16; read and written as fp32.
// For N > 1 the address of a load or a store is a multiple of 16 bytes.
template <class T, int N>
struct Vec {
  T v[N];

  __device__ float operator[](int k) const { return to_float(v[k]); }
  __device__ void set(int k, float x) { from_float(x, &v[k]); }

  __device__ void load(const T* p) {
    if constexpr (N == 1) {
      v[0] = *p;
    } else {
      static_assert(N % kVector<T> == 0, "whole 16-byte pieces");
#pragma unroll
      for (int i = 0; i < N; i += kVector<T>) {
        const uint4 bits = *reinterpret_cast<const uint4*>(p + i);
        __builtin_memcpy(v + i, &bits, sizeof bits);
      }
    }
  }

  __device__ void store(T* p) const {
    if constexpr (N == 1) {
      *p = v[0];
    } else {
      static_assert(N % kVector<T> == 0, "whole 16-byte pieces");
#pragma unroll
      for (int i = 0; i < N; i += kVector<T>) {
        uint4 bits;
        __builtin_memcpy(&bits, v + i, sizeof bits);
        *reinterpret_cast<uint4*>(p + i) = bits;
      }
    }
  }
};

// Whether 16-byte accesses may start at p (host side; null counts as aligned).
inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace fastlm
