// rope_append: one decoding step's rotation and its write to the cache.
// Computes   out = turn(norm(q), p), k_cache[p] = turn(norm(k), p), v_cache[p] = v
// Algorithm  some lanes of a warp take a head of q, k or v of one token; a norm reads the head for
//            its squares and again, from L1, to turn it
// Tile       a block of 128 threads: as many heads of one token as their vectors of pairs allow;
//            unaligned heads go pair by pair
// Traffic    reads q, k, v once and the tables' rows from the caches; writes q and the cache's rows
// Numerics   fp32, one rounding to the output; sums of squares in a fixed order
// Source     arXiv:2104.09864, equation 34; arXiv:1910.07467, equation 4
#include "ops/rope_append.h"

#include <cuda_runtime.h>

#include "rope.cuh"

namespace fastlm {
namespace {

constexpr int kThreads = 128;

__device__ inline int64_t index_at(const void* indices, bool wide, int64_t i) {
  return wide ? static_cast<const int64_t*>(indices)[i] : static_cast<const int32_t*>(indices)[i];
}

// Where a token stands: its position, and the row of the cache and the place in it.
struct Place {
  int64_t position, row, at;
  bool inside;

  __device__ Place(const RopeAppendArgs& a, int64_t b, int64_t t) : row(b), inside(false) {
    const int64_t length = a.lengths == nullptr ? a.length : index_at(a.lengths, a.wide_lengths, b);
    position = at = length - a.tokens + t;
    const int64_t keys = a.table == nullptr ? a.page_size : a.table_pages * a.page_size;
    if (position < 0 || position >= a.places || position >= keys) return;
    if (a.table != nullptr) {
      row = index_at(a.table, a.wide_table, b * a.table_row + position / a.page_size);
      at = position % a.page_size;
      if (row < 0 || row >= a.pages) return;
    }
    inside = true;
  }
};

// The lanes of a head, a power of two of neighbours.
struct Lanes {
  int width;

  __device__ int own() const { return static_cast<int>(threadIdx.x) % width; }
  __device__ float sum(float x) const {  // all of the warp must call it
    for (int offset = width / 2; offset > 0; offset /= 2) {
      x += __shfl_xor_sync(0xffffffffu, x, offset);
    }
    return x;
  }
};

// A norm's factor of element j.
template <class T>
struct Norm {
  const void* weight;
  bool wide;
  float offset, rstd;

  __device__ float operator()(float x, int64_t j) const {
    if (weight == nullptr) return x;
    const float w =
        wide ? static_cast<const float*>(weight)[j] : to_float(static_cast<const T*>(weight)[j]);
    return x * rstd * (w + offset);
  }
};

template <class T, int kVec>
__device__ inline float squares(const T* x, int64_t size, const Lanes& lanes) {
  float sum = 0.0f;
  for (int64_t i = lanes.own() * kVec; i < size; i += lanes.width * kVec) {
    Vec<T, kVec> v;
    v.load(x + i);
#pragma unroll
    for (int k = 0; k < kVec; ++k) sum = fmaf(v[k], v[k], sum);
  }
  return sum;
}

template <class T, class Tab, int kVec, bool kNeighbours>
__device__ inline void turn(const RopeAppendArgs& a, const T* x, T* y, int64_t position,
                            const Norm<T>& norm, const Lanes& lanes) {
  using Angles = Pairs<T, Tab, kVec, kNeighbours>;
  constexpr int kPairs = Angles::kPairs;
  const int64_t half = a.rotary / 2;
  const Tab* cos = static_cast<const Tab*>(a.cos) + position * a.cos_row;
  const Tab* sin = static_cast<const Tab*>(a.sin) + position * a.sin_row;
  for (int64_t i = lanes.own() * kPairs; i < half; i += lanes.width * kPairs) {
    const Angles angles(a, cos, sin, i);
    typename Angles::Row row;
    row.load(x, i, half);
#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
      const float one = norm(row.one(k), Angles::one_of(i + k, half));
      const float two = norm(row.two(k), Angles::two_of(i + k, half));
      angles.turn(row, k, one, two, false);
    }
    row.store(y, i, half);
  }
  for (int64_t i = a.rotary + lanes.own() * kVec; i < a.head_dim; i += lanes.width * kVec) {
    Vec<T, kVec> v;
    v.load(x + i);
    if (norm.weight != nullptr) {
#pragma unroll
      for (int k = 0; k < kVec; ++k) v.set(k, norm(v[k], i + k));
    }
    put(y + i, v);
  }
}

template <class T, int kVec>
__device__ inline void copy(const T* x, T* y, int64_t size, const Lanes& lanes) {
  for (int64_t i = lanes.own() * kVec; i < size; i += lanes.width * kVec) {
    Vec<T, kVec> v = {};
    if (x != nullptr) v.load(x + i);  // else zeros
    put(y + i, v);
  }
}

template <class T, class Tab, int kVec, bool kNeighbours>
__global__ void __launch_bounds__(kThreads)
    append_kernel(const __grid_constant__ RopeAppendArgs a, int width, int blocks_per_token) {
  const Lanes lanes{width};
  const int64_t token = blockIdx.x / blocks_per_token, b = token / a.tokens, t = token % a.tokens;
  int64_t h = blockIdx.x % blocks_per_token * (kThreads / width) + threadIdx.x / width;
  const Place place(a, b, t);

  // a head of q, then of k, then of v; those behind the last do nothing
  const bool of_q = h < a.heads, of_k = !of_q && h < a.heads + a.kv_heads;
  const T* x = nullptr;
  T* y = nullptr;
  const void* weight = nullptr;
  if (of_q) {
    x = static_cast<const T*>(a.q) + b * a.q_batch + h * a.q_head + t * a.q_token;
    y = static_cast<T*>(a.out) + b * a.out_batch + h * a.out_head + t * a.out_token;
    weight = a.q_weight;
  } else if (of_k) {
    h -= a.heads;
    x = static_cast<const T*>(a.k) + b * a.k_batch + h * a.k_head + t * a.k_token;
    y = static_cast<T*>(a.k_cache) + place.row * a.k_cache_row + h * a.k_cache_head +
        place.at * a.k_cache_token;
    weight = a.k_weight;
  } else if (h < a.heads + 2 * a.kv_heads) {
    h -= a.heads + a.kv_heads;
    x = static_cast<const T*>(a.v) + b * a.v_batch + h * a.v_head + t * a.v_token;
    y = static_cast<T*>(a.v_cache) + place.row * a.v_cache_row + h * a.v_cache_head +
        place.at * a.v_cache_token;
  }
  Norm<T> norm{weight, a.weight_dtype == DType::kFloat32, a.offset, 1.0f};
  if (a.q_weight != nullptr || a.k_weight != nullptr) {
    float sum = weight == nullptr ? 0.0f : squares<T, kVec>(x, a.head_dim, lanes);
    sum = lanes.sum(sum);
    norm.rstd = 1.0f / sqrtf(sum / static_cast<float>(a.head_dim) + a.eps);
  }
  if (x == nullptr) return;
  if (!place.inside) {
    if (of_q) copy<T, kVec>(nullptr, y, a.head_dim, lanes);
  } else if (of_q || of_k) {
    turn<T, Tab, kVec, kNeighbours>(a, x, y, place.position, norm, lanes);
  } else {
    copy<T, kVec>(x, y, a.value_dim, lanes);
  }
}

// Whether vectors of kVec elements may be read and written everywhere.
template <int kVec>
bool aligned(const RopeAppendArgs& a) {
  int64_t strides = a.q_batch | a.q_head | a.q_token | a.k_batch | a.k_head | a.k_token;
  strides |= a.v_batch | a.v_head | a.v_token | a.out_batch | a.out_head | a.out_token;
  strides |= a.k_cache_row | a.k_cache_head | a.k_cache_token;
  strides |= a.v_cache_row | a.v_cache_head | a.v_cache_token;
  strides |= a.head_dim | a.value_dim | a.rotary;
  bool tables = true;
  if (!a.interleaved) {  // neighbours read the tables element by element
    strides |= a.rotary / 2 | a.cos_row | a.sin_row;
    tables = aligned16(a.cos) && aligned16(a.sin);
  }
  return strides % kVec == 0 && tables && aligned16(a.q) && aligned16(a.k) && aligned16(a.v) &&
         aligned16(a.out) && aligned16(a.k_cache) && aligned16(a.v_cache);
}

template <class T, class Tab, int kVec, bool kNeighbours>
int launch(const RopeAppendArgs& a, cudaStream_t stream) {
  constexpr int kPairs = kNeighbours && kVec > 1 ? kVec / 2 : kVec;
  const int64_t turned = a.rotary / 2 / kPairs;
  const int64_t rest = (a.head_dim - a.rotary) / kVec, value = a.value_dim / kVec;
  const int64_t most = turned > rest ? turned : rest;
  int width = 1;
  while (width < 32 && width < (most > value / 2 ? most : value / 2)) width *= 2;
  const int64_t heads = a.heads + 2 * a.kv_heads, per_block = kThreads / width;
  const auto blocks = static_cast<int>((heads + per_block - 1) / per_block);
  const auto grid = static_cast<unsigned>(a.batch * a.tokens * blocks);
  append_kernel<T, Tab, kVec, kNeighbours><<<grid, kThreads, 0, stream>>>(a, width, blocks);
  return cudaGetLastError();
}

template <class T, class Tab>
int with_form(const RopeAppendArgs& a, cudaStream_t stream) {
  constexpr int kVec = kVector<T>;
  if (a.interleaved) {
    return aligned<kVec>(a) ? launch<T, Tab, kVec, true>(a, stream)
                            : launch<T, Tab, 1, true>(a, stream);
  }
  return aligned<kVec>(a) ? launch<T, Tab, kVec, false>(a, stream)
                          : launch<T, Tab, 1, false>(a, stream);
}

template <class T>
int with_table(const RopeAppendArgs& a, cudaStream_t stream) {
  if (a.rotary == 0 || a.table_dtype == DType::kFloat32) return with_form<T, float>(a, stream);
  return with_form<T, T>(a, stream);
}

}  // namespace

namespace cuda {

int rope_append(const RopeAppendArgs& a, void* stream_) {
  if (a.batch == 0 || a.tokens == 0 || a.heads + a.kv_heads == 0) return cudaSuccess;
  const auto stream = static_cast<cudaStream_t>(stream_);
  switch (a.dtype) {
    case DType::kFloat32:
      return with_form<float, float>(a, stream);
    case DType::kBFloat16:
      return with_table<__nv_bfloat16>(a, stream);
    case DType::kFloat16:
      return with_table<__half>(a, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace cuda
}  // namespace fastlm
