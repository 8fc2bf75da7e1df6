// Pairs of a head's elements and the angles that turn them, a vector at a time: what rope and
// rope_append share.
#pragma once
#include <type_traits>

#include "vec.cuh"

namespace fastlm {
namespace {

// One 16-byte store: left to itself the compiler splits those of this file into words.
template <class T, int N>
__device__ inline void put(T* p, const Vec<T, N>& v) {
  if constexpr (N == 1) {
    *p = v.v[0];
  } else {
    static_assert(N == kVector<T>, "one access");
    uint4 bits;
    __builtin_memcpy(&bits, v.v, sizeof bits);
    __stwb(reinterpret_cast<uint4*>(p), bits);
  }
}

// N values of a table, element by element: they come from the caches.
template <class Tab, int N>
__device__ inline void load_angles(const Tab* p, int step, float (&out)[N]) {
#pragma unroll
  for (int k = 0; k < N; ++k) out[k] = to_float(p[k * step]);
}

// The angles of N pairs, for their first and their second elements.
template <int N>
struct Angles {
  static constexpr int kPairs = N;
  float c1[N], c2[N], s1[N], s2[N];

  // Pair k of a row becomes (one, two) turned by the angles, or back.
  template <class Row>
  __device__ void turn(Row& row, int k, float one, float two, bool transposed) const {
    const float x1 = one * c1[k], x2 = two * c2[k];
    if (transposed) {
      row.set(k, fmaf(two, s2[k], x1), fmaf(-one, s1[k], x2));
    } else {
      row.set(k, fmaf(-two, s1[k], x1), fmaf(one, s2[k], x2));
    }
  }
};

// Both halves, N pairs: elements i.. and half + i...
template <class T, class Tab, int N>
struct Halves : Angles<N> {
  using Angles<N>::c1, Angles<N>::c2, Angles<N>::s1, Angles<N>::s2;

  template <class Args>
  __device__ Halves(const Args& a, const Tab* cos, const Tab* sin, int64_t i) {
    const int64_t second = a.full_width ? a.rotary / 2 : 0;
    Vec<Tab, N> v;
    const auto load = [&](const Tab* p, float (&out)[N]) {
      v.load(p);
#pragma unroll
      for (int k = 0; k < N; ++k) out[k] = v[k];
    };
    load(cos + i, c1);
    load(sin + i, s1);
    load(cos + second + i, c2);
    load(sin + second + i, s2);
  }

  // The elements of pair i.
  __device__ static int64_t one_of(int64_t i, int64_t) { return i; }
  __device__ static int64_t two_of(int64_t i, int64_t half) { return half + i; }

  struct Row {
    Vec<T, N> first, second;
    __device__ void load(const T* x, int64_t i, int64_t half) {
      first.load(x + i);
      second.load(x + half + i);
    }
    __device__ void store(T* y, int64_t i, int64_t half) const {
      put(y + i, first);
      put(y + half + i, second);
    }
    __device__ float one(int k) const { return first[k]; }
    __device__ float two(int k) const { return second[k]; }
    __device__ void set(int k, float a, float b) {
      first.set(k, a);
      second.set(k, b);
    }
  };
};

// Neighbours, N / 2 pairs (one where N is 1): elements 2i, 2i + 1, ...
template <class T, class Tab, int N>
struct Neighbours : Angles<(N + 1) / 2> {
  static constexpr int kPairs = (N + 1) / 2;
  using Angles<kPairs>::c1, Angles<kPairs>::c2, Angles<kPairs>::s1, Angles<kPairs>::s2;

  template <class Args>
  __device__ Neighbours(const Args& a, const Tab* cos, const Tab* sin, int64_t i) {
    const int step = a.full_width ? 2 : 1, second = a.full_width ? 1 : 0;
    cos += i * step;
    sin += i * step;
    load_angles(cos, step, c1);
    load_angles(sin, step, s1);
    load_angles(cos + second, step, c2);
    load_angles(sin + second, step, s2);
  }

  __device__ static int64_t one_of(int64_t i, int64_t) { return 2 * i; }
  __device__ static int64_t two_of(int64_t i, int64_t) { return 2 * i + 1; }

  struct Row {
    Vec<T, 2 * kPairs> v;
    __device__ void load(const T* x, int64_t i, int64_t) {
      if constexpr (N == 1) {
        v.v[0] = x[2 * i];
        v.v[1] = x[2 * i + 1];
      } else {
        v.load(x + 2 * i);
      }
    }
    __device__ void store(T* y, int64_t i, int64_t) const {
      if constexpr (N == 1) {
        y[2 * i] = v.v[0];
        y[2 * i + 1] = v.v[1];
      } else {
        put(y + 2 * i, v);
      }
    }
    __device__ float one(int k) const { return v[2 * k]; }
    __device__ float two(int k) const { return v[2 * k + 1]; }
    __device__ void set(int k, float a, float b) {
      v.set(2 * k, a);
      v.set(2 * k + 1, b);
    }
  };
};

template <class T, class Tab, int kVec, bool kNeighbours>
using Pairs = std::conditional_t<kNeighbours, Neighbours<T, Tab, kVec>, Halves<T, Tab, kVec>>;

}  // namespace
}  // namespace fastlm
