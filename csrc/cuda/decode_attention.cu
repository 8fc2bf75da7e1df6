// decode_attention forward: a few queries against a long cache.
// Computes   out[b,h,i] = softmax(scale q[b,h,i] . K[b,g]^T + alibi + mask) V[b,g]
// Algorithm  a block takes a piece of the keys of one key-value head with up to 16 query rows of
//            that head's group; its four warps take tiles of 16 keys by turns, each with a softmax
//            of its own, joined at the end; a second kernel joins the pieces. Half precision:
//            tensor cores. The places of keys and elements within a product are free, so its
//            fragments come from memory by 16-byte loads, the next keys while the present are
//            multiplied, without shared memory; byte permutations pair the keys of V. fp32, and
//            rows that are not aligned: plain sums, a thread a key, then a thread an element
// Tile       16 rows x 16 keys a warp; 16 rows x 256 keys a block in fp32
// Traffic    K and V once per 16 rows (again from the L2 cache for more), pieces a hundredth of it
// Numerics   fp32 scores, exponentials and sums; for half precision the weights are rounded to it
//            before they meet V; int8 scales multiply scores and weights. The cut depends on the
//            cache's size alone: a sequence has the same bits alone as in a batch, on any GPU
// Source     Dao et al., Flash-Decoding for long-context inference, 2023; arXiv:2205.14135
#include "ops/decode_attention.h"

#include <cuda_runtime.h>

#include <type_traits>

#include "decode_rows.cuh"
#include "mma.cuh"
#include "reduce.cuh"
#include "vec.cuh"

namespace fastlm {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32, kTile = 16;
constexpr int kWide = 256;  // threads of plain_kernel

// ---- half precision ----------------------------------------------------------------------------

// Eight neighbours of the cache, and the same as pairs of T.
template <class C>
using Eight = std::conditional_t<sizeof(C) == 1, uint2, uint4>;

template <class T>
__device__ inline uint4 pairs_of(uint4 x) {
  return x;
}
template <class T>
__device__ inline uint4 pairs_of(uint2 x) {
  const auto two = [](unsigned word, int first) {
    const auto part = [word](int i) {
      return static_cast<float>(static_cast<int8_t>(word >> 8 * i));
    };
    return pack<T>(part(first), part(first + 1));
  };
  return make_uint4(two(x.x, 0), two(x.x, 2), two(x.y, 0), two(x.y, 2));
}

// T of queries and result, C of the cache; heads of up to 64 kChunks elements, a multiple of 8.
// With g = lane / 4 and c = lane % 4 a lane holds of the keys 8n + g the elements 32i + 8c..., and
// of the values of keys 2c, 2c + 1, 2c + 8, 2c + 9 the elements 64i + 8g...
template <class T, class C, int kChunks>
__global__ void __launch_bounds__(kThreads, 2)
    tensor_kernel(const __grid_constant__ DecodeAttentionArgs a, const __grid_constant__ Launch l) {
  constexpr int kSize = 64 * kChunks, kStride = kSize + 32;  // rows on different banks
  constexpr bool kAhead = kChunks <= 2;  // registers for the next tile's keys and all its values
  __shared__ uint4 queries[kRows * kStride / 8];
  __shared__ float sums[kRows * kSize];
  __shared__ float tops[kWarps * kRows];
  __shared__ float totals[kWarps * kRows];
  const Work w = work_of(a, l);
  if (w.from >= w.last) return finish_empty(a, l, w);
  const int head_dim = static_cast<int>(a.head_dim), value_dim = static_cast<int>(a.value_dim);

  for (int at = threadIdx.x; at < kRows * kSize / 8; at += kThreads) {
    const int r = at / (kSize / 8), d = at % (kSize / 8) * 8, row = w.own_row + r;
    uint4 x = {};
    if (r < w.rows && d < head_dim) {
      const int64_t head = w.kv_head * (a.heads / a.kv_heads) + row / a.queries;
      x = *reinterpret_cast<const uint4*>(static_cast<const T*>(a.q) + w.batch * a.q_batch +
                                          head * a.q_head + row % a.queries * a.q_row + d);
    }
    queries[(r * kStride + d) / 8] = x;
  }
  __syncthreads();

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, c = lane % 4;
  const Row rows[2] = {row_of(a, w, g), row_of(a, w, g + 8)};
  const C* k = static_cast<const C*>(a.k) + w.kv_head * a.k_head;
  const C* v = static_cast<const C*>(a.v) + w.kv_head * a.v_head;
  float acc[kChunks][8][4] = {};
  float top[2] = {-INFINITY, -INFINITY}, total[2] = {};
  const bool together = a.page_size % kTile == 0;  // no page ends within a tile
  Slot tile = {0, 0};                              // where the tile begins
  const auto slot = [&](int start, int key) {
    return together ? Slot{tile.page, tile.row + key - start} : slot_of(a, l, w.batch, key);
  };
  const auto load = [](const C* p, bool some) {
    return some ? *reinterpret_cast<const Eight<C>*>(p) : Eight<C>{};
  };
  Eight<C> keys[2][2 * kChunks], values[kAhead ? kChunks : 1][4];
  const auto load_keys = [&](int start) {
    if (together && start < w.last) tile = slot_of(a, l, w.batch, start);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int key = start + 8 * n + g;
      const Slot at = key < w.last ? slot(start, key) : Slot{-1, 0};
      const C* p = k + at.page * a.k_batch + at.row * a.k_row + 8 * c;
#pragma unroll
      for (int i = 0; i < 2 * kChunks; ++i) {
        keys[n][i] = load(p + 32 * i, at.page >= 0 && 32 * i + 8 * c < head_dim);
      }
    }
  };
  const int first = w.begin + (w.from - w.begin) / kTile * kTile;
  if (kAhead) load_keys(first + kTile * warp);

  for (int start = first + kTile * warp; start < w.last; start += kTile * kWarps) {
    if (!kAhead) load_keys(start);
    const C* value_rows[4];
    float key_scale[2][2], value_scale[2][2];  // of key 8n + 2c + i
    bool known[4];
    int wrong = 0;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int key = start + n / 2 * 8 + 2 * c + n % 2;
      const Slot at = key < w.last ? slot(start, key) : Slot{-1, 0};
      known[n] = at.page >= 0;
      wrong |= key < w.last && !known[n];
      value_rows[n] = v + at.page * a.v_batch + at.row * a.v_row + 8 * g;
      if constexpr (sizeof(C) == 1) {
        key_scale[n / 2][n % 2] = known[n] ? scale_at(a.k_scale, at, w.kv_head) : 0.0f;
        value_scale[n / 2][n % 2] = known[n] ? scale_at(a.v_scale, at, w.kv_head) : 0.0f;
      }
    }
    const auto load_values = [&](int i, Eight<C>(&to)[4]) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        to[n] = load(value_rows[n] + 64 * i, known[n] && 64 * i + 8 * g < value_dim);
      }
    };
    if constexpr (kAhead) {
#pragma unroll
      for (int i = 0; i < kChunks; ++i) load_values(i, values[i]);
    }

    float s[2][4] = {};
#pragma unroll
    for (int i = 0; i < 2 * kChunks; ++i) {
      if (32 * i >= head_dim) continue;
      const uint4 low = queries[(g * kStride + 32 * i) / 8 + c];
      const uint4 high = queries[((g + 8) * kStride + 32 * i) / 8 + c];
      const uint32_t left[2][4] = {{low.x, high.x, low.y, high.y}, {low.z, high.z, low.w, high.w}};
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const uint4 x = pairs_of<T>(keys[n][i]);
        const uint32_t right[2][2] = {{x.x, x.y}, {x.z, x.w}};
        mma_16x8x16<T>(s[n], left[0], right[0]);
        mma_16x8x16<T>(s[n], left[1], right[1]);
      }
    }
    if (kAhead) load_keys(start + kTile * kWarps);

    float shrink[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float high = -INFINITY;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& x = s[n][2 * r + i];
          const int key = start + 8 * n + 2 * c + i;
          if constexpr (sizeof(C) == 1) x *= key_scale[n][i];
          x = key < w.last ? logit(a, rows[r], key, x) : -INFINITY;
          high = fmaxf(high, x);
        }
      }
      high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 1));
      high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 2));
      high = fmaxf(high, top[r]);
      shrink[r] = weight(top[r], high);
      top[r] = high;
      float sum = wrong ? NAN : 0.0f;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& x = s[n][2 * r + i];
          x = weight(x, high);
          sum += x;
          if constexpr (sizeof(C) == 1) x *= value_scale[n][i];
        }
      }
      total[r] = fmaf(total[r], shrink[r], sum);
    }
    if (__any_sync(0xffffffffu, shrink[0] != 1.0f || shrink[1] != 1.0f)) {
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
#pragma unroll
          for (int n = 0; n < 4; ++n) acc[i][e][n] *= shrink[n / 2];
        }
      }
    }
    const uint32_t weights[4] = {pack<T>(s[0][0], s[0][1]), pack<T>(s[0][2], s[0][3]),
                                 pack<T>(s[1][0], s[1][1]), pack<T>(s[1][2], s[1][3])};
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      if (64 * i >= value_dim) continue;
      if constexpr (!kAhead) load_values(i, values[0]);
      uint32_t x[4][4];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const uint4 four = pairs_of<T>(values[kAhead ? i : 0][n]);
        x[n][0] = four.x, x[n][1] = four.y, x[n][2] = four.z, x[n][3] = four.w;
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const uint32_t even[2] = {__byte_perm(x[0][e], x[1][e], 0x5410),
                                  __byte_perm(x[2][e], x[3][e], 0x5410)};
        const uint32_t odd[2] = {__byte_perm(x[0][e], x[1][e], 0x7632),
                                 __byte_perm(x[2][e], x[3][e], 0x7632)};
        mma_16x8x16<T>(acc[i][2 * e], weights, even);
        mma_16x8x16<T>(acc[i][2 * e + 1], weights, odd);
      }
    }
  }

  // The warps' sums, one after another.
  sum_over<4>(total, nullptr);
  if (c == 0) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      tops[warp * kRows + 8 * r + g] = top[r];
      totals[warp * kRows + 8 * r + g] = total[r];
    }
  }
  __syncthreads();
  float factor[2], all[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float highest = -INFINITY;
    for (int n = 0; n < kWarps; ++n) highest = fmaxf(highest, tops[n * kRows + 8 * r + g]);
    factor[r] = weight(top[r], highest);
    all[r] = 0.0f;
    for (int n = 0; n < kWarps; ++n) {
      all[r] += totals[n * kRows + 8 * r + g] * weight(tops[n * kRows + 8 * r + g], highest);
    }
    top[r] = highest;
  }
  for (int turn = 0; turn < kWarps; ++turn) {
    __syncthreads();
    if (turn == 0 && warp == 0 && c == 0) {  // all have read what stands here
      tops[g] = top[0], tops[g + 8] = top[1];
      totals[g] = all[0], totals[g + 8] = all[1];
    }
    if (warp != turn) continue;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (8 * r + g >= w.rows) continue;
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
#pragma unroll
        for (int e = 0; e < 16; ++e) {
          float& sum = sums[(8 * r + g) * kSize + 64 * i + 16 * c + e];
          sum = fmaf(acc[i][e % 8][2 * r + e / 8], factor[r], turn == 0 ? 0.0f : sum);
        }
      }
    }
  }
  __syncthreads();
  finish(a, l, w, sums, kSize, tops, totals);
}

// ---- fp32, and what is not aligned -------------------------------------------------------------

template <class C>
__global__ void __launch_bounds__(kWide, 2)
    plain_kernel(const __grid_constant__ DecodeAttentionArgs a, const __grid_constant__ Launch l) {
  constexpr int kSize = kDecodeMaxHead, kPart = 16;  // elements and keys summed apart
  static_assert(kSize == kWide, "a thread an element");
  __shared__ float queries[kRows * kSize];  // in the end the result's sums
  __shared__ float scores[kRows * kWide];
  __shared__ float value_scales[kWide];
  __shared__ int64_t places[kWide];  // of the values; -1: none
  __shared__ float tops[kRows];
  __shared__ float totals[kRows];
  __shared__ float shrinks[kRows];
  __shared__ Row rows[kRows];
  const Work w = work_of(a, l);
  if (w.from >= w.last) return finish_empty(a, l, w);
  const int head_dim = static_cast<int>(a.head_dim), value_dim = static_cast<int>(a.value_dim);
  const int t = threadIdx.x, lane = t % 32, warp = t / 32;

  for (int r = 0; r < kRows; ++r) {
    const int row = w.own_row + r;
    float x = 0.0f;
    if (r < w.rows && t < head_dim) {
      const int64_t head = w.kv_head * (a.heads / a.kv_heads) + row / a.queries;
      const int64_t at = w.batch * a.q_batch + head * a.q_head + row % a.queries * a.q_row;
      x = element(a.q, a.dtype, at + t);
    }
    queries[r * kSize + t] = x;
  }
  if (t < kRows) {
    rows[t] = row_of(a, w, t);
    tops[t] = -INFINITY;
    totals[t] = 0.0f;
  }
  __syncthreads();

  const C* k = static_cast<const C*>(a.k) + w.kv_head * a.k_head;
  const C* v = static_cast<const C*>(a.v) + w.kv_head * a.v_head;
  float acc[kRows] = {};
  for (int start = w.from; start < w.last; start += kWide) {
    const int count = w.last - start < kWide ? w.last - start : kWide;
    {  // a thread a key
      const Slot at = t < count ? slot_of(a, l, w.batch, start + t) : Slot{-1, 0};
      const bool known = at.page >= 0;
      const C* p = k + at.page * a.k_batch + at.row * a.k_row;
      float s[kRows] = {}, key_scale = 1.0f;
      places[t] = known ? at.page * a.v_batch + at.row * a.v_row : -1;
      if constexpr (sizeof(C) == 1) {
        if (known) key_scale = scale_at(a.k_scale, at, w.kv_head);
        value_scales[t] = known ? scale_at(a.v_scale, at, w.kv_head) : 0.0f;
      }
#pragma unroll 1
      for (int d = 0; d < head_dim && known; d += kPart) {
        float x[kPart];
        load_some(p + d, head_dim - d, l.aligned, x);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (r >= w.rows) break;
          float part = 0.0f;
#pragma unroll
          for (int e = 0; e < kPart; ++e) part = fmaf(queries[r * kSize + d + e], x[e], part);
          s[r] += part;
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) scores[r * kWide + t] = s[r] * key_scale;
    }
    __syncthreads();
    for (int r = warp; r < w.rows; r += kWide / 32) {  // a warp a row
      float* own = scores + r * kWide;
      const Row row = rows[r];
      float high = -INFINITY, sum[1] = {0.0f};
      for (int j = lane; j < kWide; j += 32) {
        const float x = j >= count      ? -INFINITY
                        : places[j] < 0 ? NAN
                                        : logit(a, row, start + j, own[j]);
        own[j] = x;
        high = fmaxf(high, x);
      }
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) {
        high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, offset));
      }
      const float before = tops[r], top = fmaxf(before, high);
      for (int j = lane; j < kWide; j += 32) {
        const float x = weight(own[j], top);
        sum[0] += x;
        own[j] = sizeof(C) == 1 ? x * value_scales[j] : x;
      }
      sum_over<32>(sum, nullptr);
      __syncwarp();  // all have read tops
      if (lane == 0) {
        shrinks[r] = weight(before, top);
        tops[r] = top;
        totals[r] = fmaf(totals[r], shrinks[r], sum[0]);
      }
    }
    __syncthreads();
    if (t < value_dim) {  // a thread an element
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r < w.rows) acc[r] *= shrinks[r];
      }
#pragma unroll 1
      for (int j = 0; j < count; j += kPart) {
        float x[kPart];
#pragma unroll
        for (int e = 0; e < kPart; ++e) {
          x[e] = places[j + e] >= 0 ? to_float(v[places[j + e] + t]) : 0.0f;
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (r >= w.rows) break;
          float part = 0.0f;
#pragma unroll
          for (int e = 0; e < kPart; ++e) part = fmaf(scores[r * kWide + j + e], x[e], part);
          acc[r] += part;
        }
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) queries[r * kSize + t] = acc[r];
  __syncthreads();
  finish(a, l, w, queries, kSize, tops, totals);
}

// ---- the pieces --------------------------------------------------------------------------------

// A block a row of queries: the result from its pieces, in ascending order.
__global__ void __launch_bounds__(kThreads)
    join_kernel(const __grid_constant__ DecodeAttentionArgs a, const __grid_constant__ Launch l) {
  __shared__ float shared[kWarps];
  __shared__ float factors[cuda::kDecodePieces];
  const int size = static_cast<int>(a.value_dim), pieces = static_cast<int>(l.pieces);
  const int64_t row = blockIdx.x, i = row % a.queries, head = row / a.queries % a.heads;
  const int64_t batch = row / a.queries / a.heads;
  const float* part = a.partial + row * pieces * (size + 2);
  const int t = threadIdx.x;
  const float sink = a.sinks == nullptr ? -INFINITY : a.sinks[head];
  const float own = t < pieces ? part[t * (size + 2) + size] : -INFINITY;
  const float top = fmaxf(max_over<kThreads>(own, shared), sink);
  const float factor = own == -INFINITY ? 0.0f : weight(own, top);
  float total[1] = {factor == 0.0f ? 0.0f : factor * part[t * (size + 2) + size + 1]};
  if (t < pieces) factors[t] = factor;
  sum_over<kThreads>(total, shared);  // ends with a barrier
  if (a.sinks != nullptr) total[0] += weight(sink, top);
  const int64_t out = batch * a.out_batch + head * a.out_head + i * a.out_row;
  for (int d = t; d < size; d += kThreads) {
    float sum = 0.0f;
    for (int p = 0; p < pieces; ++p) {
      if (factors[p] != 0.0f) sum = fmaf(part[p * (size + 2) + d], factors[p], sum);
    }
    put_element(sum / (total[0] == 0.0f ? 1.0f : total[0]), a.out, a.dtype, out + d);
  }
}

// Whether each row of the tensors begins at a multiple of `bytes`.
bool rows_aligned(int64_t bytes, int64_t element, const void* p, int64_t strides, int64_t size) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  return address % static_cast<uintptr_t>(bytes) == 0 && strides * element % bytes == 0 &&
         size * element % bytes == 0;
}

template <class T, class C>
int launch(const DecodeAttentionArgs& a, Launch l, cudaStream_t stream) {
  const int64_t group_rows = a.heads / a.kv_heads * a.queries;
  const int64_t blocks = l.pieces * ((group_rows + kRows - 1) / kRows) * a.kv_heads * a.batch;
  const int64_t rows = a.batch * a.heads * a.queries;
  if (blocks > INT32_MAX || rows > INT32_MAX || l.keys > INT32_MAX) return cudaErrorInvalidValue;
  if (l.pieces > cuda::kDecodePieces) return cudaErrorInvalidValue;
  const auto grid = static_cast<unsigned>(blocks);
  const int64_t q = a.q_batch | a.q_head | a.q_row, k = a.k_batch | a.k_head | a.k_row;
  const int64_t v = a.v_batch | a.v_head | a.v_row;
  bool tensor_cores = false;
  if constexpr (sizeof(T) == 2) {
    tensor_cores = rows_aligned(16, sizeof(T), a.q, q, a.head_dim) &&
                   rows_aligned(8 * sizeof(C), sizeof(C), a.k, k, a.head_dim) &&
                   rows_aligned(8 * sizeof(C), sizeof(C), a.v, v, a.value_dim);
    const int64_t most = a.head_dim > a.value_dim ? a.head_dim : a.value_dim;
    if (tensor_cores && most <= 64) {
      tensor_kernel<T, C, 1><<<grid, kThreads, 0, stream>>>(a, l);
    } else if (tensor_cores && most <= 128) {
      tensor_kernel<T, C, 2><<<grid, kThreads, 0, stream>>>(a, l);
    } else if (tensor_cores) {
      tensor_kernel<T, C, 4><<<grid, kThreads, 0, stream>>>(a, l);
    }
  }
  if (!tensor_cores) {
    l.aligned = rows_aligned(16, sizeof(C), a.k, k, a.head_dim);
    plain_kernel<C><<<grid, kWide, 0, stream>>>(a, l);
  }
  const auto joined = static_cast<unsigned>(rows);
  if (l.pieces > 1) join_kernel<<<joined, kThreads, 0, stream>>>(a, l);
  return cudaGetLastError();
}

template <class T>
int with_cache(const DecodeAttentionArgs& a, const Launch& l, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  if (a.batch * a.heads * a.queries * a.value_dim == 0) return cudaSuccess;
  return a.k_scale.data == nullptr ? launch<T, T>(a, l, stream) : launch<T, int8_t>(a, l, stream);
}

}  // namespace

namespace cuda {

int decode_attention(const DecodeAttentionArgs& a, const DecodeAttentionLaunch& l, void* stream) {
  if (a.dtype == DType::kFloat32) return with_cache<float>(a, l, stream);
  if (a.dtype == DType::kBFloat16) return with_cache<__nv_bfloat16>(a, l, stream);
  return with_cache<__half>(a, l, stream);
}

}  // namespace cuda
}  // namespace fastlm
