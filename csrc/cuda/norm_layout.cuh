// How rms_norm and layer_norm lay rows over threads, and what every kernel of theirs computes.
#pragma once
#include <cuda_runtime.h>

#include "ops/norm.h"
#include "reduce.cuh"
#include "vec.cuh"

namespace fastlm::cuda {
namespace {

// How a row is laid over threads. kHeld vectors of kVec elements per thread stay in registers;
// kHeld = 0 reads rows of any length, again for every further pass.
template <int kVec_, int kThreads_, int kHeld_>
struct Layout {
  static constexpr int kVec = kVec_;
  static constexpr int kThreads = kThreads_;                      // that share a row
  static constexpr int kBlock = kThreads < 128 ? 128 : kThreads;  // threads of a block
  static constexpr int kRows = kBlock / kThreads;                 // rows of a block
  static constexpr int kHeld = kHeld_;
  static constexpr bool kKeep = kHeld > 0;
  static constexpr int kSlots = kKeep ? kHeld : 1;
  static constexpr int kStep = kThreads * kVec;
};

// Element offsets a thread visits in a row: f(vector index, offset).
template <class L, class F>
__device__ inline void for_vectors(int64_t cols, F&& f) {
  const int first = static_cast<int>(threadIdx.x) % L::kThreads * L::kVec;
  if constexpr (L::kKeep) {
#pragma unroll
    for (int j = 0; j < L::kHeld; ++j) {
      const int i = first + j * L::kStep;
      if (i < cols) f(j, static_cast<int64_t>(i));
    }
  } else {
#pragma unroll 2
    for (int64_t i = first; i < cols; i += L::kStep) f(0, i);
  }
}

// 1 / sqrt(squares / cols + eps), rounded once: the hardware's guess (2 ulp) and a Newton step with
// what the divisions and sums before it lost.
__device__ inline float rstd_of(float squares, int64_t cols, float eps) {
  const float n = static_cast<float>(cols);
  const float mean = squares / n, v = mean + eps;
  const float lost = fmaf(-mean, n, squares) / n + (eps - (v - mean));
  const float guess = rsqrtf(v);
  const float root = v * guess, root_lost = fmaf(v, guess, -root) + lost * guess;
  const float step = 0.5f * guess * (fmaf(-root, guess, 1.0f) - root_lost * guess);
  return fabsf(step) < guess ? guess + step : guess;  // v = 0 and infinity keep the guess
}

// (w + offset) of the columns at i, `missing` without w; `wide`: w is fp32 whatever T is.
template <class T, int N>
__device__ inline void load_vector(const void* vector, bool wide, float offset, float missing,
                                   int64_t i, float (&out)[N]) {
  if (vector == nullptr) {
#pragma unroll
    for (int k = 0; k < N; ++k) out[k] = missing;
  } else if (wide) {
    Vec<float, N> w;
    w.load(static_cast<const float*>(vector) + i);
#pragma unroll
    for (int k = 0; k < N; ++k) out[k] = w[k] + offset;
  } else {
    Vec<T, N> w;
    w.load(static_cast<const T*>(vector) + i);
#pragma unroll
    for (int k = 0; k < N; ++k) out[k] = w[k] + offset;
  }
}

// Stores 16 bytes at once, where the compiler splits the plain store into single words.
template <class T, int N>
__device__ inline void store_wide(const Vec<T, N>& v, T* p) {
  static_assert(N % kVector<T> == 0, "whole 16-byte pieces");
#pragma unroll
  for (int i = 0; i < N; i += kVector<T>) {
    uint4 bits;
    __builtin_memcpy(&bits, v.v + i, sizeof bits);
    __stwb(reinterpret_cast<uint4*>(p + i), bits);
  }
}

inline unsigned grid_of(int64_t items, int per_block) {
  return static_cast<unsigned>((items + per_block - 1) / per_block);
}

}  // namespace
}  // namespace fastlm::cuda
