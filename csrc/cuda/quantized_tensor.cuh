// quantized_linear, 2 to 16 rows of half precision: the weight's integers, which T holds without
// rounding, times x on tensor cores.
//
// A lane of row g = lane / 4 loads 16 bytes of that row of the weight, a piece, which lies within
// one group: the four lanes c = lane % 4 hold four pieces and maybe as many scales. One exchange of
// halves gives lanes 0 and 2 the halves of an even piece and lanes 1 and 3 those of the next, odd
// one. A product would add up both; so each row of x is two of its columns, one that is zero
// for the odd lanes and one that is zero for the even ones, and a product has four rows of x. With
// such columns in the order even, even, odd, odd, even ... a lane's own two sums are those of its
// own piece's parity, whose scale it has at hand; the two parities are added at the very end.
// The places of k within a product are free: a lane's 8 bytes are 8 neighbours of k (4 bits: twice
// 8), and it reads the same 8 of x, 16 bytes.
#pragma once
#include <cuda_runtime.h>

#include "mma.cuh"
#include "ops/quantized_linear.h"
#include "vec.cuh"

namespace fastlm {
namespace {

constexpr int kPiece = 16;  // bytes of one load
constexpr int kTensorWarps = 8, kTensorThreads = 32 * kTensorWarps;
constexpr int kTiles = 2, kTensorOuts = 16 * kTiles;  // outputs of a block
constexpr int kColumns = 4;                           // rows of x in one product
constexpr int kMostRows = static_cast<int>(cuda::kQuantizedMostRows);
constexpr int kProducts = kMostRows / kColumns;

// Two integers as T: bytes, or the low halves of bytes as -8 ... 7; each in 16 bits of its own.
// With the bits of 128 (bf16) or 1024 (fp16) before them they are floats; that much is taken off.
template <class T, bool kBytes>
__device__ inline uint32_t as_pair(uint32_t two) {
  constexpr bool kHalf = __is_same(T, __half);
  constexpr uint32_t kOne = kHalf ? 0x64006400u : 0x43004300u;
  if constexpr (!kBytes) return difference<T>((two & 0x000f000fu) | kOne, kOne + 0x00080008u);
  if constexpr (kHalf) return difference<T>((two ^ 0x00800080u) | kOne, kOne + 0x00800080u);
  // bf16 has 7 bits after the first: the eighth is the sign, 256 instead of 128 to take off
  return difference<T>((two & 0x007f007fu) | kOne, (two & 0x00800080u) | kOne);
}

// A weight's 16 bytes and scales, one a lane, for the rows g and g + 8 of the tiles.
template <bool kMinimum>
struct Pieces {
  uint4 bits[kTiles][2];
  __half scale[kTiles][2];
  __half minimum[kMinimum ? kTiles : 1][2];
};

// The two pieces of a lane's row that it takes half of after the exchange: the even or odd one of
// the first two and of the last two.
struct HalfPair {
  uint2 of[2];
};
__device__ inline HalfPair exchange_halves(const uint4& own, bool upper) {
  const uint2 low = {own.x, own.y}, high = {own.z, own.w};
  const uint2 keep = upper ? high : low, give = upper ? low : high;
  const uint2 got = {__shfl_xor_sync(0xffffffffu, give.x, 2),
                     __shfl_xor_sync(0xffffffffu, give.y, 2)};
  return upper ? HalfPair{{got, keep}} : HalfPair{{keep, got}};
}

// The scales of those two pieces, for the rows g and g + 8.
struct Scales {
  uint32_t of[2];
  __device__ void get(int p, float (&both)[2]) const {
    __half two[2];
    __builtin_memcpy(two, &of[p], sizeof two);
    both[0] = to_float(two[0]), both[1] = to_float(two[1]);
  }
};
__device__ inline Scales exchange_scales(const __half (&own)[2], bool upper) {
  uint32_t mine;
  __builtin_memcpy(&mine, own, sizeof mine);
  const uint32_t other = __shfl_xor_sync(0xffffffffu, mine, 2);
  return upper ? Scales{{other, mine}} : Scales{{mine, other}};
}

// A block: kTensorOuts outputs, all rows; its warps take every eighth 64 bytes of the weight's
// rows.
template <class T, QuantizedForm kForm>
__global__ void __launch_bounds__(kTensorThreads, kForm == QuantizedForm::kInt4Minimum ? 1 : 2)
    tensor_kernel(const __grid_constant__ QuantizedRows a, int pieces_shift) {
  constexpr bool kBytes = kForm == QuantizedForm::kInt8;
  constexpr bool kMinimum = kForm == QuantizedForm::kInt4Minimum;
  constexpr int kSides = kBytes ? 1 : 2;    // runs of 8 values in 8 bytes
  constexpr int kStride = kTensorOuts + 8;  // rows on different banks
  constexpr uint32_t kOnes = __is_same(T, __half) ? 0x3c003c00u : 0x3f803f80u;
  __shared__ float parts[kTensorWarps][kMostRows][kStride];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, c = lane % 4;
  const bool upper = c >= 2, odd = c % 2 != 0;
  const int64_t n0 = static_cast<int64_t>(blockIdx.x) * kTensorOuts;
  const int64_t groups = a.in / a.group, half = a.group / 2;
  const int pieces = static_cast<int>(a.in / (kBytes ? kPiece : 2 * kPiece));
  const int steps = (pieces + 3) / 4, rows = static_cast<int>(a.rows);

  const uint4* values = static_cast<const uint4*>(a.values) + (n0 + g) * pieces;
  const __half* scale = static_cast<const __half*>(a.scale) + (n0 + g) * groups;
  const __half* minimum = static_cast<const __half*>(a.minimum);
  if constexpr (kMinimum) minimum += (n0 + g) * groups;
  const auto load = [&](int step, Pieces<kMinimum>& to) {
    const int piece = 4 * step + c, group = piece >> pieces_shift;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int n = 16 * t + 8 * h;
        const bool some = piece < pieces && n0 + n + g < a.out;
        to.bits[t][h] = some ? __ldcs(values + n * static_cast<int64_t>(pieces) + piece) : uint4{};
        to.scale[t][h] = some ? scale[n * groups + group] : __half{};
        if constexpr (kMinimum) to.minimum[t][h] = some ? minimum[n * groups + group] : __half{};
      }
    }
  };
  // Column g of a product: row g % 2 + 2 (g / 4) of four, against even pieces or odd ones.
  const bool own_column = (g / 2 % 2 != 0) == odd;
  const int row = g % 2 + g / 4 * 2;
  const T* x = static_cast<const T*>(a.x) + row * a.x_stride;

  float sums[kProducts][kTiles][4] = {};
  Pieces<kMinimum> now, next;
  load(warp, now);
  for (int step = warp; step < steps; step += kTensorWarps) {
    load(step + kTensorWarps, next);
    HalfPair halves[kTiles][2];
    Scales scales[kTiles], minima[kMinimum ? kTiles : 1];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      scales[t] = exchange_scales(now.scale[t], upper);
      if constexpr (kMinimum) minima[t] = exchange_scales(now.minimum[t], upper);
#pragma unroll
      for (int h = 0; h < 2; ++h) halves[t][h] = exchange_halves(now.bits[t][h], upper);
    }
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      uint32_t left[kSides][2][kTiles][4];
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {  // 4 values of k a lane
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const uint32_t word = i == 0 ? halves[t][h].of[p].x : halves[t][h].of[p].y;
            const uint32_t first = __byte_perm(word, 0, 0x4140);
            const uint32_t second = __byte_perm(word, 0, 0x4342);
#pragma unroll
            for (int side = 0; side < kSides; ++side) {
              left[side][i][t][h] = as_pair<T, kBytes>(first >> 4 * side);
              left[side][i][t][h + 2] = as_pair<T, kBytes>(second >> 4 * side);
            }
          }
        }
      }
      const int piece = 4 * step + 2 * p + odd;
      int64_t k = static_cast<int64_t>(piece) * kPiece + 8 * upper;
      if constexpr (!kBytes) k += (piece >> pieces_shift) * half;  // the high halves lie between
#pragma unroll
      for (int i = 0; i < kProducts; ++i) {
        if (kColumns * i >= rows) continue;
        const bool some = own_column && piece < pieces && kColumns * i + row < rows;
        float part[kTiles][4] = {}, total[4] = {};
#pragma unroll
        for (int side = 0; side < kSides; ++side) {
          const T* from = x + kColumns * i * a.x_stride + k + side * half;
          const uint4 right = some ? *reinterpret_cast<const uint4*>(from) : uint4{};
          const uint32_t first[2] = {right.x, right.y}, second[2] = {right.z, right.w};
#pragma unroll
          for (int t = 0; t < kTiles; ++t) {
            mma_16x8x16<T>(part[t], left[side][0][t], first);
            mma_16x8x16<T>(part[t], left[side][1][t], second);
          }
          if constexpr (kMinimum) {
            const uint32_t ones[4] = {kOnes, kOnes, kOnes, kOnes};
            mma_16x8x16<T>(total, ones, first);
            mma_16x8x16<T>(total, ones, second);
          }
        }
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          float by[2], least[2];
          scales[t].get(p, by);
          if constexpr (kMinimum) minima[t].get(p, least);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            float& sum = sums[i][t][e];
            sum = fmaf(by[e / 2], part[t][e], sum);
            if constexpr (kMinimum) {  // of the middle of the range, so that little cancels
              sum = fmaf(fmaf(8.0f, by[e / 2], least[e / 2]), total[e], sum);
            }
          }
        }
      }
    }
    now = next;
  }

  // Even and odd pieces, then the warps one after another.
#pragma unroll
  for (int i = 0; i < kProducts; ++i) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float one = sums[i][t][2 * h], two = sums[i][t][2 * h + 1];
        const float sum = (odd ? two : one) + __shfl_xor_sync(0xffffffffu, odd ? one : two, 1);
        parts[warp][kColumns * i + c][16 * t + 8 * h + g] = sum;
      }
    }
  }
  __syncthreads();
  for (int at = threadIdx.x; at < rows * kTensorOuts; at += kTensorThreads) {
    const int r = at / kTensorOuts, o = at % kTensorOuts;
    const int64_t n = n0 + o;
    if (n >= a.out) continue;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kTensorWarps; ++w) sum += parts[w][r][o];
    if (a.bias != nullptr) sum += to_float(static_cast<const T*>(a.bias)[n]);
    from_float(sum, static_cast<T*>(a.y) + r * a.out + n);
  }
}

}  // namespace
}  // namespace fastlm
