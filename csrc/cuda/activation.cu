// activation forward and backward, plain and gated.
// Computes   y = act(x) (* up); dx = g act'(x) (* up), dup = g act(x)
// Algorithm  one pass; the derivative and the value come from the same exponential
// Tile       a block of 256 threads covers 2 * 256 vectors of 16 bytes of one row; where no input
//            has gaps between its rows everything is one row; rows that are not aligned go element
//            by element, and look up their function at run time
// Traffic    reads each input and writes each output once
// Numerics   fp32, one rounding; the sigmoid from e^-|x|, so that neither tail cancels; Phi by erfc
// Source     arXiv:1606.08415 (gelu, silu), arXiv:2109.08668 (relu2), arXiv:2002.05202 (gated)
#include "ops/activation.h"

#include <cuda_runtime.h>

#include "vec.cuh"

namespace fastlm {
namespace {

constexpr int kThreads = 256, kUnroll = 2;

// 1 / (1 + e^-x), and what is missing to one.
__device__ inline float sigmoid(float x, float* rest) {
  const float e = expf(-fabsf(x)), near = 1.0f / (1.0f + e), far = e * near;
  *rest = x < 0.0f ? near : far;
  return x < 0.0f ? far : near;
}

// act(x), and its derivative to *slope.
template <Activation kAct>
__device__ inline float activate(float x, float* slope) {
  if constexpr (kAct == Activation::kSilu) {
    float rest;
    const float s = sigmoid(x, &rest), y = x * s;
    *slope = fmaf(y, rest, s);
    return y;
  }
  if constexpr (kAct == Activation::kGelu) {
    const float below = 0.5f * erfcf(x * -0.70710678f);
    *slope = fmaf(x * 0.39894228f, expf(-0.5f * x * x), below);
    return x * below;
  }
  if constexpr (kAct == Activation::kGeluTanh) {
    constexpr float kA = 1.5957691f, kB = kA * 0.044715f;  // 2 sqrt(2 / pi)
    const float t = x * x;
    float rest;
    const float s = sigmoid(x * fmaf(t, kB, kA), &rest), y = x * s;
    *slope = fmaf(y * rest, fmaf(t, 3.0f * kB, kA), s);
    return y;
  }
  const float r = x < 0.0f ? 0.0f : x;  // NaN stays
  if constexpr (kAct == Activation::kRelu) {
    *slope = x > 0.0f ? 1.0f : 0.0f;
    return r;
  }
  *slope = r + r;  // kRelu2
  return r * r;
}

// kAct, or with kAsked the function asked for at run time.
template <Activation kAct, bool kAsked>
__device__ inline float activate(Activation asked, float x, float* slope) {
  if constexpr (!kAsked) return activate<kAct>(x, slope);
  switch (asked) {
    case Activation::kSilu:
      return activate<Activation::kSilu>(x, slope);
    case Activation::kGelu:
      return activate<Activation::kGelu>(x, slope);
    case Activation::kGeluTanh:
      return activate<Activation::kGeluTanh>(x, slope);
    case Activation::kRelu:
      return activate<Activation::kRelu>(x, slope);
    default:
      return activate<Activation::kRelu2>(x, slope);
  }
}

// The columns of this thread: f(row, column, elements) for whole vectors, then for single elements.
template <int kVec, class F>
__device__ inline void for_columns(int64_t cols, int64_t blocks_per_row, F&& f) {
  const int64_t row = blockIdx.x / blocks_per_row, part = blockIdx.x % blocks_per_row;
  const int64_t first = (part * kUnroll * kThreads + threadIdx.x) * kVec;
#pragma unroll
  for (int j = 0; j < kUnroll; ++j) {
    const int64_t i = first + j * kThreads * kVec;
    if (i + kVec <= cols) {
      f(row, i, Vec<float, kVec>());
    } else if constexpr (kVec > 1) {
      for (int64_t k = i; k < cols; ++k) f(row, k, Vec<float, 1>());
    }
  }
}

template <class T, int kVec, bool kGated, Activation kAct>
__global__ void __launch_bounds__(kThreads, 3)
    forward_kernel(const ActivationForward a, int64_t blocks_per_row) {
  for_columns<kVec>(a.cols, blocks_per_row, [&](int64_t row, int64_t i, auto shape) {
    constexpr int kN = sizeof(shape) / sizeof(float);
    Vec<T, kN> x, up;
    x.load(static_cast<const T*>(a.x) + row * a.x_stride + i);
    if constexpr (kGated) up.load(static_cast<const T*>(a.up) + row * a.up_stride + i);
#pragma unroll
    for (int k = 0; k < kN; ++k) {
      float slope, y = activate<kAct, kVec == 1>(a.act, x[k], &slope);
      if constexpr (kGated) y *= up[k];
      x.set(k, y);
    }
    x.store(static_cast<T*>(a.y) + row * a.cols + i);
  });
}

template <class T, int kVec, bool kGated, Activation kAct>
__global__ void __launch_bounds__(kThreads, 3)
    backward_kernel(const ActivationBackward a, int64_t blocks_per_row) {
  for_columns<kVec>(a.cols, blocks_per_row, [&](int64_t row, int64_t i, auto shape) {
    constexpr int kN = sizeof(shape) / sizeof(float);
    Vec<T, kN> g, x, up;
    g.load(static_cast<const T*>(a.grad) + row * a.cols + i);
    x.load(static_cast<const T*>(a.x) + row * a.x_stride + i);
    if constexpr (kGated) up.load(static_cast<const T*>(a.up) + row * a.up_stride + i);
#pragma unroll
    for (int k = 0; k < kN; ++k) {
      float slope;
      const float y = activate<kAct, kVec == 1>(a.act, x[k], &slope), grad = g[k];
      if constexpr (kGated) {
        x.set(k, grad * slope * up[k]);
        up.set(k, grad * y);
      } else {
        x.set(k, grad * slope);
      }
    }
    x.store(static_cast<T*>(a.dx) + row * a.dx_stride + i);
    if constexpr (kGated) up.store(static_cast<T*>(a.dup) + row * a.dup_stride + i);
  });
}

template <class Args, class T, int kVec, bool kGated, Activation kAct>
void launch(const Args& a, cudaStream_t stream) {
  constexpr int64_t kBlock = kThreads * kUnroll * kVec;
  const int64_t per_row = (a.cols + kBlock - 1) / kBlock;
  const auto grid = static_cast<unsigned>(a.rows * per_row);
  if constexpr (__is_same(Args, ActivationForward)) {
    forward_kernel<T, kVec, kGated, kAct><<<grid, kThreads, 0, stream>>>(a, per_row);
  } else {
    backward_kernel<T, kVec, kGated, kAct><<<grid, kThreads, 0, stream>>>(a, per_row);
  }
}

template <class T, bool kGated, class Args>
void with_kind(const Args& a, cudaStream_t stream) {
  constexpr int kVec = kVector<T>;
  switch (a.act) {
    case Activation::kSilu:
      return launch<Args, T, kVec, kGated, Activation::kSilu>(a, stream);
    case Activation::kGelu:
      return launch<Args, T, kVec, kGated, Activation::kGelu>(a, stream);
    case Activation::kGeluTanh:
      return launch<Args, T, kVec, kGated, Activation::kGeluTanh>(a, stream);
    case Activation::kRelu:
      return launch<Args, T, kVec, kGated, Activation::kRelu>(a, stream);
    case Activation::kRelu2:
      return launch<Args, T, kVec, kGated, Activation::kRelu2>(a, stream);
  }
}

template <class T, bool kGated, class Args>
int with_form(const Args& a, bool aligned, cudaStream_t stream) {
  if (a.act < Activation::kSilu || a.act > Activation::kRelu2) return cudaErrorInvalidValue;
  if (aligned) {
    with_kind<T, kGated>(a, stream);
  } else {
    launch<Args, T, 1, kGated, Activation::kSilu>(a, stream);  // whichever it is
  }
  return cudaGetLastError();
}

template <class T, class Args>
int with_vector(const Args& a, bool pointers, cudaStream_t stream) {
  constexpr int kVec = kVector<T>;
  int64_t strides = a.x_stride | (a.up == nullptr ? 0 : a.up_stride) | a.cols;
  if constexpr (__is_same(Args, ActivationBackward)) {
    strides |= a.dx_stride | (a.up == nullptr ? 0 : a.dup_stride);
  }
  const bool aligned = pointers && (a.rows == 1 || strides % kVec == 0);
  return a.up == nullptr ? with_form<T, false>(a, aligned, stream)
                         : with_form<T, true>(a, aligned, stream);
}

template <class Args>
int with_type(const Args& a, bool pointers, void* stream) {
  if (a.rows == 0 || a.cols == 0) return cudaSuccess;
  const auto on = static_cast<cudaStream_t>(stream);
  if (a.dtype == DType::kFloat32) return with_vector<float>(a, pointers, on);
  if (a.dtype == DType::kBFloat16) return with_vector<__nv_bfloat16>(a, pointers, on);
  return cudaErrorInvalidValue;
}

}  // namespace

namespace cuda {

int activation_forward(const ActivationForward& a, void* stream) {
  return with_type(a, aligned16(a.x) && aligned16(a.up) && aligned16(a.y), stream);
}

int activation_backward(const ActivationBackward& a, void* stream) {
  const bool aligned =
      aligned16(a.grad) && aligned16(a.x) && aligned16(a.up) && aligned16(a.dx) && aligned16(a.dup);
  return with_type(a, aligned, stream);
}

}  // namespace cuda
}  // namespace fastlm
