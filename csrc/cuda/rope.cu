// rope forward and backward.
// Computes   y1 = x1 c1 - x2 s1, y2 = x2 c2 + x1 s2 for each pair of the first R elements of a head
// Algorithm  a thread holds the angles of one vector of pairs of one token and rotates that vector
// in
//            four heads, whose loads are on their way together; q and k in one launch
// Tile       a block covers four heads of as many tokens as 256 vectors of pairs make; unaligned
//            rows go pair by pair
// Traffic    reads x once, writes y; the tables once per four heads, mostly from the caches.
//            y may be x: a thread writes what it alone has read
// Numerics   fp32, one rounding to the output
// Source     arXiv:2104.09864, equation 34
#include "ops/rope.h"

#include <cuda_runtime.h>

#include "rope.cuh"

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

template <class T, class Tab, int kVec, bool kNeighbours>
__global__ void __launch_bounds__(kThreads, 2) rotate_kernel(const __grid_constant__ Parts parts) {
  using Angles = Pairs<T, Tab, kVec, kNeighbours>;
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
        angles.turn(rows[h], k, rows[h].one(k), rows[h].two(k), a.transposed);
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
