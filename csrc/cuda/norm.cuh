// What rms_norm and layer_norm share on the GPU: layouts, the two kernels, their launches.
// kCentered: subtract the mean (layer_norm). A row's mean is summed first, then corrected by the
// sum of what is left, so that a mean far above the spread costs no digits.
#pragma once
#include <cuda_runtime.h>

#include "ops/norm.h"
#include "reduce.cuh"
#include "vec.cuh"

namespace fastlm::cuda {
namespace {

// How a row is laid over threads. kHeld vectors of kVec elements per thread stay in registers;
// kHeld = 0 reads rows of any length, again for every further pass.
template <int kVec_, int kThreads_, int kHeld_>
struct Layout {
  static constexpr int kVec = kVec_;
  static constexpr int kThreads = kThreads_;                      // that share a row
  static constexpr int kBlock = kThreads < 128 ? 128 : kThreads;  // threads of a block
  static constexpr int kRows = kBlock / kThreads;                 // rows of a block
  static constexpr int kHeld = kHeld_;
  static constexpr bool kKeep = kHeld > 0;
  static constexpr int kSlots = kKeep ? kHeld : 1;
  static constexpr int kStep = kThreads * kVec;
};

// Element offsets a thread visits in a row: f(vector index, offset).
template <class L, class F>
__device__ inline void for_vectors(int64_t cols, F&& f) {
  const int first = static_cast<int>(threadIdx.x) % L::kThreads * L::kVec;
  if constexpr (L::kKeep) {
#pragma unroll
    for (int j = 0; j < L::kHeld; ++j) {
      const int i = first + j * L::kStep;
      if (i < cols) f(j, static_cast<int64_t>(i));
    }
  } else {
#pragma unroll 2
    for (int64_t i = first; i < cols; i += L::kStep) f(0, i);
  }
}

// 1 / sqrt(squares / cols + eps), rounded once: the hardware's guess (2 ulp) and a Newton step with
// what the divisions and sums before it lost.
__device__ inline float rstd_of(float squares, int64_t cols, float eps) {
  const float n = static_cast<float>(cols);
  const float mean = squares / n, v = mean + eps;
  const float lost = fmaf(-mean, n, squares) / n + (eps - (v - mean));
  const float guess = rsqrtf(v);
  const float root = v * guess, root_lost = fmaf(v, guess, -root) + lost * guess;
  const float step = 0.5f * guess * (fmaf(-root, guess, 1.0f) - root_lost * guess);
  return fabsf(step) < guess ? guess + step : guess;  // v = 0 and infinity keep the guess
}

// (w + offset) of the columns at i, `missing` without w; `wide`: w is fp32 whatever T is.
template <class T, int N>
__device__ inline void load_vector(const void* vector, bool wide, float offset, float missing,
                                   int64_t i, float (&out)[N]) {
  if (vector == nullptr) {
#pragma unroll
    for (int k = 0; k < N; ++k) out[k] = missing;
  } else if (wide) {
    Vec<float, N> w;
    w.load(static_cast<const float*>(vector) + i);
#pragma unroll
    for (int k = 0; k < N; ++k) out[k] = w[k] + offset;
  } else {
    Vec<T, N> w;
    w.load(static_cast<const T*>(vector) + i);
#pragma unroll
    for (int k = 0; k < N; ++k) out[k] = w[k] + offset;
  }
}

template <bool kCentered, class T, class L>
__global__ void __launch_bounds__(L::kBlock) forward_kernel(const NormForward a) {
  __shared__ float shared[2 * (L::kBlock / 32)];
  constexpr int kVec = L::kVec;
  const int64_t r = static_cast<int64_t>(blockIdx.x) * L::kRows + threadIdx.x / L::kThreads;
  const int64_t cols = r < a.rows ? a.cols : 0;  // an idle thread still takes part in the sums
  const T* x = static_cast<const T*>(a.x) + r * a.cols;
  const T* residual = static_cast<const T*>(a.residual);
  T* summed = static_cast<T*>(a.summed) + r * a.cols;
  T* y = static_cast<T*>(a.y) + r * a.cols;
  const T* again = residual != nullptr ? summed : x;
  const bool wide = a.weight_dtype == DType::kFloat32;
  const float n = static_cast<float>(a.cols);

  Vec<T, kVec> s[L::kSlots];
  float first[1] = {0.0f};  // the sum of squares, or of values
  for_vectors<L>(cols, [&](int j, int64_t i) {
    s[j].load(x + i);
    if (residual != nullptr) {  // the norm of the rounded sum: of what the next layer will see
      Vec<T, kVec> other;
      other.load(residual + r * a.cols + i);
#pragma unroll
      for (int k = 0; k < kVec; ++k) s[j].set(k, s[j][k] + other[k]);
      s[j].store(summed + i);
    }
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      first[0] = kCentered ? first[0] + s[j][k] : fmaf(s[j][k], s[j][k], first[0]);
    }
  });
  sum_over<L::kThreads>(first, shared);
  float mean = 0.0f, squares = first[0];
  if constexpr (kCentered) {
    mean = first[0] / n;
    float left[2] = {0.0f, 0.0f};  // of (s - mean) and its square
    for_vectors<L>(cols, [&](int j, int64_t i) {
      if constexpr (!L::kKeep) s[j].load(again + i);
#pragma unroll
      for (int k = 0; k < kVec; ++k) {
        const float d = s[j][k] - mean;
        left[0] += d;
        left[1] = fmaf(d, d, left[1]);
      }
    });
    sum_over<L::kThreads>(left, shared);
    const float shift = left[0] / n;
    squares = fmaxf(left[1] - shift * left[0], 0.0f);
    mean += shift;
  }
  const float rstd = rstd_of(squares, a.cols, a.eps);

  for_vectors<L>(cols, [&](int j, int64_t i) {
    float scale[kVec], bias[kVec];
    load_vector<T>(a.weight, wide, a.offset, 1.0f, i, scale);
    if constexpr (kCentered) load_vector<T>(a.bias, wide, 0.0f, 0.0f, i, bias);
    if constexpr (!L::kKeep) s[j].load(again + i);
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      if constexpr (kCentered) {
        s[j].set(k, fmaf((s[j][k] - mean) * rstd, scale[k], bias[k]));
      } else {
        s[j].set(k, s[j][k] * rstd * scale[k]);
      }
    }
    s[j].store(y + i);
  });
}

// Partial sums of a run's columns: in registers, or in memory where a row does not fit there.
template <class L>
struct Columns {
  float* to;  // the run's row of partial sums, or null
  Vec<float, L::kVec> v[L::kSlots] = {};

  __device__ void begin(int j, int64_t i, bool first) {
    if constexpr (!L::kKeep) {
      if (to != nullptr && !first) {
        v[j].load(to + i);
      } else {
        v[j] = {};
      }
    }
  }
  __device__ void end(int j, int64_t i) const {
    if constexpr (!L::kKeep) {
      if (to != nullptr) v[j].store(to + i);
    }
  }
  __device__ void finish(int64_t cols) const {
    if constexpr (L::kKeep) {
      if (to != nullptr) for_vectors<L>(cols, [&](int j, int64_t i) { v[j].store(to + i); });
    }
  }
};

// One run of rows per kThreads threads; run b covers rows [rows*b/runs, rows*(b+1)/runs).
template <bool kCentered, class T, class L>
__global__ void __launch_bounds__(L::kBlock, 512 / L::kBlock)
    backward_kernel(const NormBackward a) {
  __shared__ float shared[4 * (L::kBlock / 32)];
  constexpr int kVec = L::kVec;
  const int64_t run = static_cast<int64_t>(blockIdx.x) * L::kRows + threadIdx.x / L::kThreads;
  const bool active = run < a.blocks;
  const int64_t begin = active ? a.rows * run / a.blocks : 0;
  const int64_t end = active ? a.rows * (run + 1) / a.blocks : 0;
  const int64_t longest = (a.rows + a.blocks - 1) / a.blocks;  // the same for every thread
  const bool wide = a.weight_dtype == DType::kFloat32;
  const float n = static_cast<float>(a.cols);
  const T* extra = static_cast<const T*>(a.grad_summed);
  const auto partial = [&](float* all) {
    return all == nullptr || !active ? nullptr : all + run * a.cols;
  };
  Columns<L> dw{partial(a.dweight_blocks)}, db{kCentered ? partial(a.dbias_blocks) : nullptr};

  for (int64_t step = 0; step < longest; ++step) {
    const int64_t r = begin + step;
    const int64_t cols = r < end ? a.cols : 0;
    const T* x = static_cast<const T*>(a.x) + r * a.cols;
    const T* grad = static_cast<const T*>(a.grad) + r * a.cols;
    T* dx = static_cast<T*>(a.dx) + r * a.cols;

    Vec<T, kVec> s[L::kSlots], g[L::kSlots];
    float mean = 0.0f;
    if constexpr (kCentered) {
      float sum[1] = {0.0f};
      for_vectors<L>(cols, [&](int j, int64_t i) {
        s[j].load(x + i);
        if constexpr (L::kKeep) g[j].load(grad + i);  // both are on their way at once
#pragma unroll
        for (int k = 0; k < kVec; ++k) sum[0] += s[j][k];
      });
      sum_over<L::kThreads>(sum, shared);
      mean = sum[0] / n;
    }
    // of d*d and g*w*d with d = s - mean; centered also of d and g*w
    constexpr int kTotals = kCentered ? 4 : 2;
    float totals[kTotals] = {};
    for_vectors<L>(cols, [&](int j, int64_t i) {
      float scale[kVec];
      if constexpr (!kCentered || !L::kKeep) {
        s[j].load(x + i);
        g[j].load(grad + i);
      }
      load_vector<T>(a.weight, wide, a.offset, 1.0f, i, scale);
#pragma unroll
      for (int k = 0; k < kVec; ++k) {
        const float d = s[j][k] - mean, gw = g[j][k] * scale[k];
        totals[0] = fmaf(d, d, totals[0]);
        totals[1] = fmaf(gw, d, totals[1]);
        if constexpr (kCentered) {
          totals[2] += d;
          totals[3] += gw;
        }
      }
    });
    sum_over<L::kThreads>(totals, shared);
    float even = 0.0f;  // the mean of g*w
    if constexpr (kCentered) {
      const float shift = totals[2] / n;
      totals[0] = fmaxf(totals[0] - shift * totals[2], 0.0f);
      totals[1] -= shift * totals[3];
      mean += shift;
      even = totals[3] / n;
    }
    const float rstd = rstd_of(totals[0], a.cols, a.eps);
    const float slope = rstd * rstd * totals[1] / n;

    for_vectors<L>(cols, [&](int j, int64_t i) {
      if constexpr (!L::kKeep) {
        s[j].load(x + i);
        g[j].load(grad + i);
      }
      dw.begin(j, i, step == 0);
      if constexpr (kCentered) db.begin(j, i, step == 0);
      float scale[kVec];
      load_vector<T>(a.weight, wide, a.offset, 1.0f, i, scale);
      Vec<T, kVec> more = {}, out;
      if (extra != nullptr) more.load(extra + r * a.cols + i);
#pragma unroll
      for (int k = 0; k < kVec; ++k) {
        const float d = s[j][k] - mean;
        const float gw = kCentered ? fmaf(g[j][k], scale[k], -even) : g[j][k] * scale[k];
        out.set(k, fmaf(rstd, fmaf(-d, slope, gw), more[k]));
        dw.v[j].v[k] = fmaf(g[j][k] * rstd, d, dw.v[j].v[k]);
        if constexpr (kCentered) db.v[j].v[k] += g[j][k];
      }
      out.store(dx + i);
      dw.end(j, i);
      if constexpr (kCentered) db.end(j, i);
    });
  }
  dw.finish(a.cols);
  if constexpr (kCentered) db.finish(a.cols);
}

// out[c] = sum over runs of partial[run, c]: 32 columns a block, 32 warps over the runs.
template <class W>
__global__ void __launch_bounds__(1024)
    sum_runs_kernel(const float* partial, W* out, int64_t runs, int64_t cols) {
  __shared__ float shared[32][33];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t c = static_cast<int64_t>(blockIdx.x) * 32 + lane;
  float sum = 0.0f;
  if (c < cols) {
    for (int64_t run = warp; run < runs; run += 32) sum += partial[run * cols + c];
  }
  shared[warp][lane] = sum;
  __syncthreads();
  float total[1] = {shared[lane][warp]};  // transposed: a warp sums one column
  sum_over<32>(total, nullptr);
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + warp;
  if (lane == 0 && column < cols) from_float(total[0], out + column);
}

inline unsigned grid_of(int64_t items, int per_block) {
  return static_cast<unsigned>((items + per_block - 1) / per_block);
}

template <bool kCentered, class T>
struct Forward {
  const NormForward& args;
  cudaStream_t stream;
  template <class L>
  void run() const {
    forward_kernel<kCentered, T, L><<<grid_of(args.rows, L::kRows), L::kBlock, 0, stream>>>(args);
  }
};

template <bool kCentered, class T>
struct Backward {
  const NormBackward& args;
  cudaStream_t stream;
  template <class L>
  void run() const {
    backward_kernel<kCentered, T, L>
        <<<grid_of(args.blocks, L::kRows), L::kBlock, 0, stream>>>(args);
  }
};

// Launches the smallest layout that keeps a row in registers, kHeld vectors a thread.
template <class T, int kHeld, class Launch>
void with_layout(int64_t cols, bool aligned, const Launch& launch) {
  constexpr int kVec = kVector<T>;
  if (!aligned || cols % kVec != 0) return launch.template run<Layout<1, 128, 0>>();
  const int64_t vectors = cols / kVec;
  if (vectors <= 8 * kHeld) return launch.template run<Layout<kVec, 8, kHeld>>();
  if (vectors <= 32 * kHeld) return launch.template run<Layout<kVec, 32, kHeld>>();
  if (vectors <= 128 * kHeld) return launch.template run<Layout<kVec, 128, kHeld>>();
  if (vectors <= 512 * kHeld) return launch.template run<Layout<kVec, 512, kHeld>>();
  return launch.template run<Layout<kVec, 512, 0>>();
}

template <bool kCentered>
int norm_forward(const NormForward& a, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  const bool aligned = aligned16(a.x) && aligned16(a.residual) && aligned16(a.weight) &&
                       aligned16(a.bias) && aligned16(a.y) && aligned16(a.summed);
  if (a.rows == 0 || a.cols == 0) return cudaSuccess;
  if (a.dtype == DType::kFloat32) {
    with_layout<float, 4>(a.cols, aligned, Forward<kCentered, float>{a, stream});
  } else if (a.dtype == DType::kBFloat16) {
    with_layout<__nv_bfloat16, 4>(a.cols, aligned, Forward<kCentered, __nv_bfloat16>{a, stream});
  } else {
    return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

// out [cols] of the weight's type: the sum of the runs' partial sums.
inline void sum_runs(const float* partial, void* out, const NormBackward& a, cudaStream_t stream) {
  if (out == nullptr) return;
  const int64_t runs = a.rows == 0 ? 0 : a.blocks;
  const unsigned grid = grid_of(a.cols, 32);
  if (a.weight_dtype == DType::kFloat32) {
    float* to = static_cast<float*>(out);
    sum_runs_kernel<float><<<grid, 1024, 0, stream>>>(partial, to, runs, a.cols);
  } else {
    __nv_bfloat16* to = static_cast<__nv_bfloat16*>(out);
    sum_runs_kernel<__nv_bfloat16><<<grid, 1024, 0, stream>>>(partial, to, runs, a.cols);
  }
}

// Two partial sums per column leave registers for half as many columns.
template <bool kCentered>
int norm_backward(const NormBackward& a, void* dweight, void* dbias, void* stream_) {
  constexpr int kHeld = kCentered ? 2 : 4;
  const auto stream = static_cast<cudaStream_t>(stream_);
  const bool aligned = aligned16(a.grad) && aligned16(a.grad_summed) && aligned16(a.x) &&
                       aligned16(a.weight) && aligned16(a.dx) && aligned16(a.dweight_blocks) &&
                       aligned16(a.dbias_blocks);
  if (a.cols == 0) return cudaSuccess;
  if (a.rows != 0 && a.dtype == DType::kFloat32) {
    with_layout<float, kHeld>(a.cols, aligned, Backward<kCentered, float>{a, stream});
  } else if (a.rows != 0 && a.dtype == DType::kBFloat16) {
    with_layout<__nv_bfloat16, kHeld>(a.cols, aligned,
                                      Backward<kCentered, __nv_bfloat16>{a, stream});
  } else if (a.rows != 0) {
    return cudaErrorInvalidValue;
  }
  sum_runs(a.dweight_blocks, dweight, a, stream);
  sum_runs(a.dbias_blocks, dbias, a, stream);
  return cudaGetLastError();
}

// At least 4 rows each, and no more than fill a large GPU a few times. A number of the shape alone,
// so that the weight's gradient has the same bits on every GPU.
inline int64_t norm_runs(int64_t rows, int64_t cols) {
  const int64_t most = cols < 1024 ? (1 << 20) / (cols > 0 ? cols : 1) : 1056;
  const int64_t runs = (rows + 3) / 4;
  return runs < most ? runs : most;
}

}  // namespace
}  // namespace fastlm::cuda
