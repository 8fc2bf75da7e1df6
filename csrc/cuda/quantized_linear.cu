// quantized_linear: a few rows against a weight of 8 or 4 bits.
// Computes   y[r,n] = sum_g scale[n,g] sum_{k in g} q[n,k] x[r,k] (+ minimum[n,g] sum_{k in g}
// x[r,k])
//                     (+ bias[n])
// Algorithm  one row, and fp32: a warp takes some outputs and rows of x; each lane multiplies every
//            32nd 16 bytes of their integers and scales what they add up to; the lanes' sums are
//            added at the end. Integers become floats by a byte permutation into the mantissa of
//            2^23. Several rows of half precision: quantized_tensor.cuh
// Tile       a block of 4 warps: 8 outputs, 1 or 4 rows of x
// Traffic    the integers and scales once for 4 rows, x from the caches
// Numerics   exact products of integers, fp32 sums in a fixed order, one rounding to y
// Source     arXiv:2210.17323, section 5; the layout is GGUF's
#include "ops/quantized_linear.h"

#include <cuda_runtime.h>

#include "quantized_tensor.cuh"
#include "reduce.cuh"
#include "vec.cuh"

namespace fastlm {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kOuts = 2;  // outputs of a warp
// Four bytes of `word`, unsigned and below 2^8, minus `zero`.
__device__ inline void to_floats(uint32_t word, float zero, float (&q)[4]) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const uint32_t bits = __byte_perm(word, 0x4b000000u, 0x7440u + k);  // 2^23 + byte
    q[k] = __uint_as_float(bits) - (8388608.0f + zero);
  }
}

// Four neighbours of x.
template <class T>
__device__ inline void load_four(const T* x, float (&out)[4]) {
  if constexpr (sizeof(T) == 4) {
    Vec<T, 4> v;
    v.load(x);
#pragma unroll
    for (int k = 0; k < 4; ++k) out[k] = v[k];
  } else {
    const uint2 bits = *reinterpret_cast<const uint2*>(x);
    T v[4];
    __builtin_memcpy(v, &bits, sizeof bits);
#pragma unroll
    for (int k = 0; k < 4; ++k) out[k] = to_float(v[k]);
  }
}

// sums[r][o] += x[r] . q[o] for four columns; `total`: the sums of x, for the minima.
template <bool kTotals, int kRows>
__device__ inline void add_four(const float (&x)[kRows][4], const float (&q)[kOuts][4],
                                float (&sums)[kRows][kOuts], float (&total)[kRows]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int o = 0; o < kOuts; ++o) sums[r][o] = fmaf(q[o][k], x[r][k], sums[r][o]);
      if constexpr (kTotals) total[r] += x[r][k];
    }
  }
}

template <class T, QuantizedForm kForm, int kRows>
__global__ void __launch_bounds__(kThreads)
    multiply_kernel(const QuantizedRows a, int pieces_shift, int row_blocks) {
  constexpr bool kBytes = kForm == QuantizedForm::kInt8;
  constexpr bool kMinimum = kForm == QuantizedForm::kInt4Minimum;
  constexpr float kZero = kBytes ? 128.0f : 8.0f;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t n0 = (static_cast<int64_t>(blockIdx.x / row_blocks) * kWarps + warp) * kOuts;
  const int64_t r0 = static_cast<int64_t>(blockIdx.x % row_blocks) * kRows;
  const int64_t groups = a.in / a.group;
  const int pieces = static_cast<int>(a.in / (kBytes ? kPiece : 2 * kPiece));
  const int64_t half = a.group / 2;

  // Rows and outputs beyond the last are the last again; their sums are not stored.
  const uint4* values[kOuts];
  const __half *scale[kOuts], *minimum[kOuts];
#pragma unroll
  for (int o = 0; o < kOuts; ++o) {
    const int64_t n = n0 + o < a.out ? n0 + o : a.out - 1;
    values[o] = static_cast<const uint4*>(a.values) + n * pieces;
    scale[o] = static_cast<const __half*>(a.scale) + n * groups;
    minimum[o] = kMinimum ? static_cast<const __half*>(a.minimum) + n * groups : nullptr;
  }
  const T* x[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    x[r] = static_cast<const T*>(a.x) + (r0 + r < a.rows ? r0 + r : a.rows - 1) * a.x_stride;
  }

  float sums[kRows * kOuts] = {};
#pragma unroll(kRows == 1 ? 2 : 1)
  for (int piece = lane; piece < pieces; piece += 32) {
    const int g = piece >> pieces_shift;
    uint4 bits[kOuts];
    float step[kOuts];
#pragma unroll
    for (int o = 0; o < kOuts; ++o) {
      bits[o] = values[o][piece];
      step[o] = to_float(scale[o][g]);
    }
    int64_t k = static_cast<int64_t>(piece) * kPiece;  // of the first value
    if constexpr (!kBytes) k += g * half;              // the group's high halves lie between
    float part[kRows][kOuts] = {}, total[kRows] = {};
#pragma unroll
    for (int w = 0; w < 4; ++w, k += 4) {
      float some[kRows][4], q[kOuts][4];
#pragma unroll
      for (int r = 0; r < kRows; ++r) load_four(x[r] + k, some[r]);
      uint32_t word[kOuts];
#pragma unroll
      for (int o = 0; o < kOuts; ++o) {
        word[o] = w == 0 ? bits[o].x : w == 1 ? bits[o].y : w == 2 ? bits[o].z : bits[o].w;
        to_floats(kBytes ? word[o] ^ 0x80808080u : word[o] & 0x0f0f0f0fu, kZero, q[o]);
      }
      add_four<kMinimum>(some, q, part, total);
      if constexpr (!kBytes) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) load_four(x[r] + k + half, some[r]);
#pragma unroll
        for (int o = 0; o < kOuts; ++o) to_floats(word[o] >> 4 & 0x0f0f0f0fu, kZero, q[o]);
        add_four<kMinimum>(some, q, part, total);
      }
    }
#pragma unroll
    for (int o = 0; o < kOuts; ++o) {
      // of the middle of the range, so that little cancels
      const float least = kMinimum ? fmaf(8.0f, step[o], to_float(minimum[o][g])) : 0.0f;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float& sum = sums[r * kOuts + o];
        sum = fmaf(step[o], part[r][o], sum);
        if constexpr (kMinimum) sum = fmaf(least, total[r], sum);
      }
    }
  }
  sum_over<32>(sums, nullptr);
#pragma unroll
  for (int i = 0; i < kRows * kOuts; ++i) {
    const int64_t r = r0 + i / kOuts, n = n0 + i % kOuts;
    if (lane != i || r >= a.rows || n >= a.out) continue;
    const float b = a.bias == nullptr ? 0.0f : to_float(static_cast<const T*>(a.bias)[n]);
    from_float(sums[i] + b, static_cast<T*>(a.y) + r * a.out + n);
  }
}

template <QuantizedForm kForm>
int pieces_shift(const QuantizedRows& a) {
  int shift = -5 + (kForm == QuantizedForm::kInt8);  // a group of 32 is two pieces, or one
  for (int64_t g = a.group; g > 1; g /= 2) ++shift;
  return shift;
}

template <class T, QuantizedForm kForm, int kRows>
int launch(const QuantizedRows& a, cudaStream_t stream) {
  const int shift = pieces_shift<kForm>(a);
  const auto row_blocks = static_cast<int>((a.rows + kRows - 1) / kRows);
  const int64_t blocks = (a.out + kWarps * kOuts - 1) / (kWarps * kOuts) * row_blocks;
  const auto grid = static_cast<unsigned>(blocks);
  multiply_kernel<T, kForm, kRows><<<grid, kThreads, 0, stream>>>(a, shift, row_blocks);
  return cudaGetLastError();
}

template <class T, QuantizedForm kForm>
int with_rows(const QuantizedRows& a, cudaStream_t stream) {
  if (a.rows == 1) return launch<T, kForm, 1>(a, stream);
  if constexpr (sizeof(T) == 4) {
    return launch<T, kForm, 4>(a, stream);
  } else {
    const auto grid = static_cast<unsigned>((a.out + kTensorOuts - 1) / kTensorOuts);
    tensor_kernel<T, kForm><<<grid, kTensorThreads, 0, stream>>>(a, pieces_shift<kForm>(a));
    return cudaGetLastError();
  }
}

template <class T>
int with_form(const QuantizedRows& a, cudaStream_t stream) {
  switch (a.form) {
    case QuantizedForm::kInt8:
      return with_rows<T, QuantizedForm::kInt8>(a, stream);
    case QuantizedForm::kInt4:
      return with_rows<T, QuantizedForm::kInt4>(a, stream);
    case QuantizedForm::kInt4Minimum:
      return with_rows<T, QuantizedForm::kInt4Minimum>(a, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

namespace cuda {

int quantized_linear(const QuantizedRows& a, void* stream_) {
  if (a.rows == 0 || a.out == 0) return cudaSuccess;
  const auto stream = static_cast<cudaStream_t>(stream_);
  switch (a.dtype) {
    case DType::kFloat32:
      return with_form<float>(a, stream);
    case DType::kBFloat16:
      return with_form<__nv_bfloat16>(a, stream);
    case DType::kFloat16:
      return with_form<__half>(a, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace cuda
}  // namespace fastlm
