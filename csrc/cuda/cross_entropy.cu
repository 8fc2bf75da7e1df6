// cross_entropy and its gradient.
// Computes   the loss of csrc/ops/cross_entropy.h and its gradient
//            grad[r,c] = scale (p (w[t] (1 - e + 2 z_loss lse) + e/V sum w) - e/V w[c])
//                        - scale w[t] (1 - e) at c = t, with p = e^(z[r,c] - lse[r])
// Algorithm  each thread keeps a running maximum and sum of its columns; the block joins them; the
//            gradient is written in a second pass over what the thread still holds in registers
//            and, of longer rows, reads again from the L2 cache. Numbers that need all rows (the
//            weight of the tokens that count, the mean) come from two kernels of one block: no host
//            sync
// Tile       a block of 512 threads a row, 16-byte vectors, the first 4 of a thread stay in
// registers;
//            unaligned rows go element by element
// Traffic    reads the logits once from memory, writes the gradient once; may overwrite the logits
// Numerics   fp32, one rounding to the gradient, fixed order; a target out of range gives NaN
// Source     Milakov and Gimelshein, arXiv:1805.02867 (online softmax)
#include "ops/cross_entropy.h"

#include <cuda_runtime.h>

#include "reduce.cuh"
#include "vec.cuh"

namespace fastlm {
namespace {

constexpr int kThreads = 512, kHeld = 4;
constexpr float kLog2e = 1.44269504f;

__device__ inline float exponential(float x) { return exp2f(x * kLog2e); }

// What becomes of a logit before the softmax: nothing, or z = cap tanh(x / cap).
template <bool kCapped>
__device__ inline float bounded(float x, float cap) {
  if constexpr (kCapped) return cap * tanhf(x / cap);
  return x;
}

// The largest z so far and the sum of e^(z - top).
struct Softmax {
  float top = -INFINITY, sum = 0.0f;

  template <int N>
  __device__ void add(const float (&z)[N]) {
    float high = z[0];
#pragma unroll
    for (int k = 1; k < N; ++k) high = fmaxf(high, z[k]);
    if (high > top) {
      sum *= exponential(top - high);
      top = high;
    }
    const float from = top == -INFINITY ? 0.0f : top;  // all masked out so far: NaN still adds up
#pragma unroll
    for (int k = 0; k < N; ++k) sum += exponential(z[k] - from);
  }

  __device__ void join(float* shared) {
    const float own = top;
    top = max_over<kThreads>(top, shared);
    float all[1] = {sum * (own == -INFINITY ? 0.0f : exponential(own - top))};
    sum_over<kThreads>(all, shared);
    sum = all[0];
  }
};

template <class T, int kVec, bool kCapped>
__global__ void __launch_bounds__(kThreads)
    rows_kernel(const CrossEntropy a, const cuda::CrossEntropyLaunch more) {
  __shared__ float shared[kThreads / 32];
  constexpr int64_t kStep = kThreads * kVec;
  const int64_t r = blockIdx.x;
  const int64_t t = a.target[r], first = static_cast<int64_t>(threadIdx.x) * kVec;
  const T* x = static_cast<const T*>(a.logits) + r * a.classes;
  T* g = a.grad == nullptr ? nullptr : static_cast<T*>(a.grad) + r * a.classes;
  const float token = a.scale == nullptr ? 1.0f : a.scale[r];
  const float scale = a.factor * token / (more.mean ? more.work[0] : 1.0f);
  const bool ignored = t == a.ignore_index, lost = !ignored && (t < 0 || t >= a.classes);
  if (ignored) {
    if (threadIdx.x == 0) a.loss[r] = 0.0f;
    if (g == nullptr) return;
    for (int64_t i = first; i < a.classes; i += kStep) Vec<T, kVec>{}.store(g + i);
    return;
  }
  // before anything is overwritten
  const float zt = lost ? NAN : bounded<kCapped>(to_float(x[t]), a.softcap);

  Vec<T, kVec> held[kHeld];
  const auto bound = [&](const Vec<T, kVec>& v, float (&z)[kVec]) {
#pragma unroll
    for (int k = 0; k < kVec; ++k) z[k] = bounded<kCapped>(v[k], a.softcap);
  };
  // f(vector, offset) for the thread's columns; `again`: the first are in registers
  const auto for_columns = [&](bool again, auto&& f) {
    if (!again) {
#pragma unroll
      for (int j = 0; j < kHeld; ++j) {
        if (first + j * kStep < a.classes) held[j].load(x + first + j * kStep);
      }
    }
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      if (first + j * kStep < a.classes) f(held[j], first + j * kStep);
    }
#pragma unroll 2
    for (int64_t i = first + kHeld * kStep; i < a.classes; i += kStep) {
      Vec<T, kVec> v;
      v.load(x + i);
      f(v, i);
    }
  };
  Softmax s;
  for_columns(false, [&](const Vec<T, kVec>& v, int64_t) {
    float z[kVec];
    bound(v, z);
    s.add(z);
  });
  s.join(shared);

  const bool slopes = g != nullptr && scale != 0.0f;
  const float w = a.class_weight == nullptr || lost ? 1.0f : a.class_weight[t];
  const float w_sum = a.class_weight == nullptr ? a.class_weight_sum : more.work[1];
  const float log_sum = logf(s.sum), lse = s.top + log_sum;
  const float spread = a.smoothing / static_cast<float>(a.classes);
  const float keep = w * (1.0f - a.smoothing);
  float slope = keep + 2.0f * a.z_loss * w * lse + spread * w_sum;
  if (lost) slope = NAN;
  const float factor = scale * slope / s.sum, even = scale * spread;
  float drop[1] = {0.0f};  // sum of w (top - z)
  if (slopes || a.smoothing != 0.0f || g != nullptr) {
    for_columns(true, [&](const Vec<T, kVec>& v, int64_t i) {
      float z[kVec];
      bound(v, z);
      Vec<T, kVec> out = {};
#pragma unroll
      for (int k = 0; k < kVec; ++k) {
        const float wc = a.class_weight == nullptr ? 1.0f : a.class_weight[i + k];
        drop[0] = fmaf(wc, s.top - z[k], drop[0]);
        const float p = exponential(z[k] - s.top);
        float d = i + k == t ? scale * slope * (p / s.sum) - scale * keep : p * factor;
        d = fmaf(-even, wc, d);
        if constexpr (kCapped) d *= 1.0f - z[k] / a.softcap * (z[k] / a.softcap);
        if (slopes) out.set(k, d);
      }
      if (g != nullptr) out.store(g + i);
    });
  }
  if (a.smoothing != 0.0f) sum_over<kThreads>(drop, shared);
  if (threadIdx.x == 0) {
    float loss = (1.0f - a.smoothing) * ((s.top - zt) + log_sum);
    if (a.z_loss != 0.0f) loss += a.z_loss * lse * lse;
    loss *= w;
    if (a.smoothing != 0.0f) loss += spread * (drop[0] + w_sum * log_sum);
    a.loss[r] = a.scale == nullptr ? loss : loss * token;
  }
}

// work[0] = the weight of the tokens that count, work[1] = the sum of the class weights.
__global__ void __launch_bounds__(kThreads) count_kernel(const CrossEntropy a, float* work) {
  __shared__ float shared[2 * (kThreads / 32)];
  float sums[2] = {0.0f, 0.0f};
  for (int64_t r = threadIdx.x; r < a.rows; r += kThreads) {
    const int64_t t = a.target[r];
    if (t == a.ignore_index || t < 0 || t >= a.classes) continue;
    const float w = a.class_weight == nullptr ? 1.0f : a.class_weight[t];
    sums[0] = fmaf(a.scale == nullptr ? 1.0f : a.scale[r], w, sums[0]);
  }
  for (int64_t c = threadIdx.x; a.class_weight != nullptr && c < a.classes; c += kThreads) {
    sums[1] += a.class_weight[c];
  }
  sum_over<kThreads>(sums, shared);
  if (threadIdx.x == 0) {
    work[0] = sums[0];
    work[1] = sums[1];
  }
}

__global__ void __launch_bounds__(kThreads)
    total_kernel(const float* loss, int64_t rows, const float* count, float* out) {
  __shared__ float shared[kThreads / 32];
  float total[1] = {0.0f};
  for (int64_t r = threadIdx.x; r < rows; r += kThreads) total[0] += loss[r];
  sum_over<kThreads>(total, shared);
  if (threadIdx.x == 0) *out = count == nullptr ? total[0] : total[0] / *count;
}

template <class T, int kVec>
void launch(const CrossEntropy& a, const cuda::CrossEntropyLaunch& more, cudaStream_t stream) {
  const auto grid = static_cast<unsigned>(a.rows);
  if (a.softcap > 0.0f) {
    rows_kernel<T, kVec, true><<<grid, kThreads, 0, stream>>>(a, more);
  } else {
    rows_kernel<T, kVec, false><<<grid, kThreads, 0, stream>>>(a, more);
  }
}

template <class T>
void with_vector(const CrossEntropy& a, const cuda::CrossEntropyLaunch& more, cudaStream_t stream) {
  if (aligned16(a.logits) && aligned16(a.grad) && a.classes % kVector<T> == 0) {
    return launch<T, kVector<T>>(a, more, stream);
  }
  launch<T, 1>(a, more, stream);
}

}  // namespace

namespace cuda {

int cross_entropy(const CrossEntropy& a, const CrossEntropyLaunch& more, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  if (more.mean || a.class_weight != nullptr) {
    count_kernel<<<1, kThreads, 0, stream>>>(a, more.work);
  }
  if (a.rows > 0) {
    if (a.dtype == DType::kFloat32) {
      with_vector<float>(a, more, stream);
    } else if (a.dtype == DType::kBFloat16) {
      with_vector<__nv_bfloat16>(a, more, stream);
    } else {
      return cudaErrorInvalidValue;
    }
  }
  if (more.out != nullptr) {
    const float* count = more.mean ? more.work : nullptr;
    total_kernel<<<1, kThreads, 0, stream>>>(a.loss, a.rows, count, more.out);
  }
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace fastlm
