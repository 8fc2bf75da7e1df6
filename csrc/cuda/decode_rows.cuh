// What decode_attention's kernels share: which rows and keys a block has, where keys lie, what
// becomes of a score, what is written in the end.
#pragma once
#include <cuda_runtime.h>

#include "ops/decode_attention.h"
#include "vec.cuh"

namespace fastlm {
namespace {

using Launch = cuda::DecodeAttentionLaunch;

constexpr int kRows = 16;  // of queries a block holds at most

// What a block works on: up to kRows rows of a key-value head's group against the keys [from, last)
// of its piece.
struct Work {
  int64_t batch, first_row;  // of all rows, in the order batch, head, query
  int kv_head, own_row;      // own_row: of the group's rows
  int rows, length, begin, from, last, piece;
};

__device__ inline Work work_of(const DecodeAttentionArgs& a, const Launch& l) {
  Work w;
  const int group_rows = static_cast<int>(a.heads / a.kv_heads * a.queries);
  const int blocks = (group_rows + kRows - 1) / kRows;
  int64_t rest = blockIdx.x;
  w.piece = static_cast<int>(rest % l.pieces), rest /= l.pieces;
  w.own_row = static_cast<int>(rest % blocks) * kRows, rest /= blocks;
  w.kv_head = static_cast<int>(rest % a.kv_heads);
  w.batch = rest / a.kv_heads;
  w.first_row = (w.batch * a.kv_heads + w.kv_head) * group_rows + w.own_row;
  w.rows = group_rows - w.own_row < kRows ? group_rows - w.own_row : kRows;
  int64_t length = l.length;
  if (l.lengths != nullptr) {
    length = l.wide_lengths ? static_cast<const int64_t*>(l.lengths)[w.batch]
                            : static_cast<const int32_t*>(l.lengths)[w.batch];
  }
  length = length < 0 ? 0 : length > l.keys ? l.keys : length;  // never outside the cache
  w.length = static_cast<int>(length);
  const int64_t begin = w.piece * l.piece, end = begin + l.piece;
  const int64_t seen = a.window > 0 ? length - a.queries - a.window + 1 : 0;
  w.begin = static_cast<int>(begin);
  w.from = static_cast<int>(seen > begin ? seen : begin);
  w.last = static_cast<int>(end < length ? end : length);
  return w;
}

// Where a key lies in the cache; page -1: the table names none.
struct Slot {
  int64_t page;
  int row;
};

__device__ inline Slot slot_of(const DecodeAttentionArgs& a, const Launch& l, int64_t b, int key) {
  if (a.page_size == 0) return {b, key};
  const int size = static_cast<int>(a.page_size);
  const int64_t at = b * a.table_row + key / size;
  const int64_t page = l.wide_table ? static_cast<const int64_t*>(l.table)[at]
                                    : static_cast<const int32_t*>(l.table)[at];
  return {page >= 0 && page < l.pages ? page : -1, key % size};
}

__device__ inline float scale_at(const Scales& s, const Slot& at, int head) {
  const int64_t i = at.page * s.batch + head * s.head + at.row * s.row;
  return s.dtype == DType::kFloat32 ? static_cast<const float*>(s.data)[i]
                                    : to_float(static_cast<const __half*>(s.data)[i]);
}

// N elements from p on as fp32, zero beyond the `left` there are.
template <int N, class C>
__device__ inline void load_some(const C* p, int left, bool aligned, float (&out)[N]) {
  constexpr int kVec = kVector<C>;
  if (aligned) {
#pragma unroll
    for (int i = 0; i < N; i += kVec) {
      Vec<C, kVec> x = {};
      if (i < left) x.load(p + i);
#pragma unroll
      for (int e = 0; e < kVec; ++e) out[i + e] = x[e];
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = i < left ? to_float(p[i]) : 0.0f;
  }
}

// Element i of the queries or the result, of a type known at run time.
__device__ inline float element(const void* p, DType dtype, int64_t i) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(p)[i];
  if (dtype == DType::kBFloat16) return to_float(static_cast<const __nv_bfloat16*>(p)[i]);
  return to_float(static_cast<const __half*>(p)[i]);
}
__device__ inline void put_element(float x, void* p, DType dtype, int64_t i) {
  if (dtype == DType::kFloat32) return from_float(x, static_cast<float*>(p) + i);
  if (dtype == DType::kBFloat16) return from_float(x, static_cast<__nv_bfloat16*>(p) + i);
  from_float(x, static_cast<__half*>(p) + i);
}

// One row of queries.
struct Row {
  int position;
  float slope;
  int64_t mask;  // where its mask begins
};

__device__ inline Row row_of(const DecodeAttentionArgs& a, const Work& w, int r) {
  if (r >= w.rows) return {-1, 0.0f, 0};  // sees no key
  const int queries = static_cast<int>(a.queries), row = w.own_row + r, i = row % queries;
  const int64_t head = w.kv_head * (a.heads / a.kv_heads) + row / queries;
  const float slope = a.slopes == nullptr ? 0.0f : a.slopes[w.batch * a.slopes_batch + head];
  const int64_t mask = w.batch * a.mask.batch + head * a.mask.head + i * a.mask.row;
  return {w.length - queries + i, slope, mask};
}

// The logit of a key, from its product with the query.
__device__ inline float logit(const DecodeAttentionArgs& a, const Row& row, int key, float s) {
  const int ahead = key - row.position;
  if (ahead > 0 || (a.window > 0 && ahead <= -a.window)) return -INFINITY;
  s *= a.scale;
  if (a.softcap != 0.0f) s = a.softcap * tanhf(s / a.softcap);
  if (a.slopes != nullptr) s = fmaf(row.slope, static_cast<float>(ahead), s);
  if (a.mask.data == nullptr) return s;
  const int64_t at = row.mask + key * a.mask.key;
  if (a.mask.added) return s + static_cast<const float*>(a.mask.data)[at];
  return static_cast<const uint8_t*>(a.mask.data)[at] != 0 ? s : -INFINITY;
}

// e^(x - top), 0 where nothing was seen so far.
__device__ inline float weight(float x, float top) {
  return expf(x - (top == -INFINITY ? 0.0f : top));
}

// Writes the rows whose sums over the keys of this piece are in shared memory: the result, or with
// several pieces the sums, maximum and sum of weights.
__device__ inline void finish(const DecodeAttentionArgs& a, const Launch& l, const Work& w,
                              const float* sums, int stride, const float* tops,
                              const float* totals) {
  const int size = static_cast<int>(a.value_dim), queries = static_cast<int>(a.queries);
  for (int at = threadIdx.x; at < w.rows * size; at += blockDim.x) {
    const int r = at / size, d = at % size;
    const float sum = sums[r * stride + d];
    if (l.pieces > 1) {
      float* part = a.partial + ((w.first_row + r) * l.pieces + w.piece) * (size + 2);
      part[d] = sum;
      if (d == 0) part[size] = tops[r], part[size + 1] = totals[r];
      continue;
    }
    const int64_t head = w.kv_head * (a.heads / a.kv_heads) + (w.own_row + r) / queries;
    const int64_t i = (w.own_row + r) % queries;
    float total = totals[r], shrink = 1.0f;
    if (a.sinks != nullptr) {
      const float top = fmaxf(tops[r], a.sinks[head]);
      shrink = weight(tops[r], top);
      total = fmaf(total, shrink, weight(a.sinks[head], top));
    }
    const int64_t out = w.batch * a.out_batch + head * a.out_head + i * a.out_row;
    put_element(sum * shrink / (total == 0.0f ? 1.0f : total), a.out, a.dtype, out + d);
  }
}

// A piece without a key that is seen says only so.
__device__ inline void finish_empty(const DecodeAttentionArgs& a, const Launch& l, const Work& w) {
  const int size = static_cast<int>(a.value_dim), queries = static_cast<int>(a.queries);
  if (l.pieces > 1) {
    if (threadIdx.x >= w.rows) return;
    float* part = a.partial + ((w.first_row + threadIdx.x) * l.pieces + w.piece) * (size + 2);
    part[size] = -INFINITY;
    part[size + 1] = 0.0f;
    return;
  }
  for (int at = threadIdx.x; at < w.rows * size; at += blockDim.x) {
    const int row = w.own_row + at / size;
    const int64_t head = w.kv_head * (a.heads / a.kv_heads) + row / queries;
    const int64_t out = w.batch * a.out_batch + head * a.out_head + row % queries * a.out_row;
    put_element(0.0f, a.out, a.dtype, out + at % size);
  }
}

}  // namespace
}  // namespace fastlm
