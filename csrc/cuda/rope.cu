// rope forward and backward.
// Computes   y1 = x1 c1 - x2 s1, y2 = x2 c2 + x1 s2 for each pair of the first R elements of a head
// Algorithm  a thread holds the angles of one vector of pairs of one token and rotates that vector
// in
//            four heads, whose loads are on their way together; q and k in one launch
// Tile       a block covers four heads of as many tokens as 256 vectors of pairs make; unaligned
//            rows go pair by pair
// Traffic    reads x once, writes y; the tables once per four heads, mostly from the caches
// Numerics   fp32, one rounding to the output
// Source     arXiv:2104.09864, equation 34
#include "ops/rope.h"

#include <cuda_runtime.h>

#include <type_traits>

#include "vec.cuh"

namespace fastlm {
namespace {

constexpr int kThreads = 256, kHeads = 4;

// What a launch covers of one tensor.
struct Part {
  RopeArgs a;
  int64_t blocks;  // token blocks x head blocks x batch, the first fastest
  int places;      // of kVec pairs (or of kVec / 2 neighbours), then of elements to copy, in a row
  int turned;      // of these, those that turn
  int block_tokens;
};

// q and k in one launch; the second has no blocks where there is one tensor.
struct Parts {
  Part part[2];
};

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

// Both halves, N pairs: elements i.. and half + i...
template <class T, class Tab, int N>
struct Halves {
  static constexpr int kPairs = N;
  float c1[N], c2[N], s1[N], s2[N];

  __device__ Halves(const RopeArgs& a, const Tab* cos, const Tab* sin, int64_t i) {
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
struct Neighbours {
  static constexpr int kPairs = N == 1 ? 1 : N / 2;
  float c1[kPairs], c2[kPairs], s1[kPairs], s2[kPairs];

  __device__ Neighbours(const RopeArgs& a, const Tab* cos, const Tab* sin, int64_t i) {
    const int step = a.full_width ? 2 : 1, second = a.full_width ? 1 : 0;
    cos += i * step;
    sin += i * step;
    load_angles(cos, step, c1);
    load_angles(sin, step, s1);
    load_angles(cos + second, step, c2);
    load_angles(sin + second, step, s2);
  }

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
__global__ void __launch_bounds__(kThreads, 2) rotate_kernel(const __grid_constant__ Parts parts) {
  using Angles = std::conditional_t<kNeighbours, Neighbours<T, Tab, kVec>, Halves<T, Tab, kVec>>;
  using Row = typename Angles::Row;
  const bool later = blockIdx.x >= parts.part[0].blocks;
  const Part& part = parts.part[later];
  const RopeArgs& a = part.a;
  const int64_t block = blockIdx.x - (later ? parts.part[0].blocks : 0);
  const int64_t token_blocks = (a.tokens + part.block_tokens - 1) / part.block_tokens;
  const int64_t head_blocks = (a.heads + kHeads - 1) / kHeads;
  const int64_t t0 = block % token_blocks * part.block_tokens;
  const int64_t h0 = block / token_blocks % head_blocks * kHeads;
  const int64_t b = block / token_blocks / head_blocks;
  const int64_t heads = a.heads - h0 < kHeads ? a.heads - h0 : kHeads;
  const int64_t half = a.rotary / 2;

  for (int at = threadIdx.x; at < part.block_tokens * part.places; at += kThreads) {
    const int64_t t = t0 + at / part.places;
    if (t >= a.tokens) return;
    const int place = at % part.places;
    const T* x = static_cast<const T*>(a.x) + b * a.x_batch + h0 * a.x_head + t * a.x_token;
    T* y = static_cast<T*>(a.y) + b * a.y_batch + h0 * a.y_head + t * a.y_token;
    if (place >= part.turned) {  // behind what turns
      const int64_t i = a.rotary + static_cast<int64_t>(place - part.turned) * kVec;
      for (int64_t h = 0; h < heads; ++h) {
        Vec<T, kVec> v;
        v.load(x + h * a.x_head + i);
        put(y + h * a.y_head + i, v);
      }
      continue;
    }
    const int64_t i = static_cast<int64_t>(place) * Angles::kPairs;
    const Angles angles(a, static_cast<const Tab*>(a.cos) + b * a.cos_batch + t * a.cos_token,
                        static_cast<const Tab*>(a.sin) + b * a.sin_batch + t * a.sin_token, i);
    Row rows[kHeads];
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      if (h < heads) rows[h].load(x + h * a.x_head, i, half);
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      if (h >= heads) break;
#pragma unroll
      for (int k = 0; k < Angles::kPairs; ++k) {
        const float one = rows[h].one(k), two = rows[h].two(k);
        const float x1 = one * angles.c1[k], x2 = two * angles.c2[k];
        if (a.transposed) {
          rows[h].set(k, fmaf(two, angles.s2[k], x1), fmaf(-one, angles.s1[k], x2));
        } else {
          rows[h].set(k, fmaf(-two, angles.s1[k], x1), fmaf(one, angles.s2[k], x2));
        }
      }
      rows[h].store(y + h * a.y_head, i, half);
    }
  }
}

// Whether vectors of kVec elements may be read and written everywhere.
template <int kVec>
bool aligned(const RopeArgs& a) {
  int64_t strides = a.x_batch | a.x_head | a.x_token | a.y_batch | a.y_head | a.y_token;
  strides |= a.head_dim | a.rotary;
  if (!a.interleaved)
    strides |= a.rotary / 2 | a.cos_batch | a.cos_token | a.sin_batch | a.sin_token;
  const bool tables = a.interleaved || (aligned16(a.cos) && aligned16(a.sin));
  return strides % kVec == 0 && aligned16(a.x) && aligned16(a.y) && tables;
}

template <class T, class Tab, int kVec, bool kNeighbours>
int launch(const RopeArgs* args, int count, cudaStream_t stream) {
  constexpr int kPairs = kNeighbours && kVec > 1 ? kVec / 2 : kVec;
  Parts parts = {};
  int64_t blocks = 0;
  for (int i = 0; i < count; ++i) {
    Part& part = parts.part[i];
    part.a = args[i];
    part.turned = static_cast<int>(args[i].rotary / 2 / kPairs);
    part.places = part.turned + static_cast<int>((args[i].head_dim - args[i].rotary) / kVec);
    part.block_tokens = part.places < kThreads ? kThreads / part.places : 1;
    const int64_t token_blocks = (part.a.tokens + part.block_tokens - 1) / part.block_tokens;
    part.blocks = token_blocks * ((part.a.heads + kHeads - 1) / kHeads) * part.a.batch;
    blocks += part.blocks;
  }
  if (blocks == 0) return cudaSuccess;
  const auto grid = static_cast<unsigned>(blocks);
  rotate_kernel<T, Tab, kVec, kNeighbours><<<grid, kThreads, 0, stream>>>(parts);
  return cudaGetLastError();
}

template <class T, class Tab>
int with_form(const RopeArgs* args, int count, cudaStream_t stream) {
  constexpr int kVec = kVector<T>;
  bool wide = true;
  for (int i = 0; i < count; ++i) wide = wide && aligned<kVec>(args[i]);
  if (args[0].interleaved) {
    return wide ? launch<T, Tab, kVec, true>(args, count, stream)
                : launch<T, Tab, 1, true>(args, count, stream);
  }
  return wide ? launch<T, Tab, kVec, false>(args, count, stream)
              : launch<T, Tab, 1, false>(args, count, stream);
}

}  // namespace

namespace cuda {

int rope(const RopeArgs* args, int count, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  if (args[0].dtype == DType::kFloat32) return with_form<float, float>(args, count, stream);
  if (args[0].dtype != DType::kBFloat16) return cudaErrorInvalidValue;
  if (args[0].table_dtype == DType::kFloat32) {
    return with_form<__nv_bfloat16, float>(args, count, stream);
  }
  return with_form<__nv_bfloat16, __nv_bfloat16>(args, count, stream);
}

}  // namespace cuda
}  // namespace fastlm
