// Sums and maxima over the threads that share a row: part of a warp, a warp, or a whole block.
#pragma once
#include <type_traits>

namespace fastlm {

// Replaces each v[i] by its sum over kThreads neighbouring threads, in a fixed order that gives
// every one of them the same bits. kThreads is a power of two below 32 or a multiple of 32; above
// 32 it is the block size and `shared` holds N * kThreads / 32 numbers. All threads of the block
// must call it.
template <int kThreads, class S, int N>
__device__ inline void sum_over(S (&v)[N], std::type_identity_t<S>* shared) {
  constexpr int kWidth = kThreads < 32 ? kThreads : 32;
#pragma unroll
  for (int offset = kWidth / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] += __shfl_xor_sync(0xffffffffu, v[i], offset);
  }
  if constexpr (kThreads > 32) {
    constexpr int kWarps = kThreads / 32;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    __syncthreads();  // the last call's readers are done
    if (lane == 0) {
#pragma unroll
      for (int i = 0; i < N; ++i) shared[i * kWarps + warp] = v[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; ++i) {
      v[i] = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) v[i] += shared[i * kWarps + w];
    }
  }
}

__device__ inline float larger(float a, float b) { return fmaxf(a, b); }
__device__ inline unsigned long long larger(unsigned long long a, unsigned long long b) {
  return a > b ? a : b;
}

// The largest x of a block of kThreads threads, a multiple of 32; `shared` holds one number per
// warp.
template <int kThreads, class S>
__device__ inline S max_over(S x, S* shared) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    x = larger(x, __shfl_xor_sync(0xffffffffu, x, offset));
  }
  __syncthreads();  // the last call's readers are done
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  x = shared[0];
#pragma unroll
  for (int w = 1; w < kThreads / 32; ++w) x = larger(x, shared[w]);
  return x;
}

}  // namespace fastlm
