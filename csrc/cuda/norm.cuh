// What rms_norm and layer_norm share on the GPU: the two kernels and their launches.
// kCentered: subtract the mean (layer_norm). A row's mean is summed first, then corrected by the
// sum of what is left, so that a mean far above the spread costs no digits.
#pragma once
#include "norm_layout.cuh"
#include "norm_pieces.cuh"

namespace fastlm::cuda {
namespace {

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

template <bool kCentered, class T>
void forward_of(const NormForward& a, bool aligned, cudaStream_t stream) {
  if (a.pieces != nullptr && aligned && a.cols % kVector<T> == 0) {
    return forward_in_pieces<kCentered, T>(a, stream);
  }
  with_layout<T, 4>(a.cols, aligned, Forward<kCentered, T>{a, stream});
}

template <bool kCentered>
int norm_forward(const NormForward& a, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  const bool aligned = aligned16(a.x) && aligned16(a.residual) && aligned16(a.weight) &&
                       aligned16(a.bias) && aligned16(a.y) && aligned16(a.summed);
  if (a.rows == 0 || a.cols == 0) return cudaSuccess;
  if (a.dtype == DType::kFloat32) {
    forward_of<kCentered, float>(a, aligned, stream);
  } else if (a.dtype == DType::kBFloat16) {
    forward_of<kCentered, __nv_bfloat16>(a, aligned, stream);
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
template <bool kCentered, class T>
void backward_of(const NormBackward& a, bool aligned, cudaStream_t stream) {
  constexpr int kHeld = kCentered ? 2 : 4;
  if (a.pieces != nullptr && aligned && a.cols % kVector<T> == 0) {
    return backward_in_pieces<kCentered, T>(a, stream);
  }
  with_layout<T, kHeld>(a.cols, aligned, Backward<kCentered, T>{a, stream});
}

template <bool kCentered>
int norm_backward(const NormBackward& a, void* dweight, void* dbias, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  const bool aligned = aligned16(a.grad) && aligned16(a.grad_summed) && aligned16(a.x) &&
                       aligned16(a.weight) && aligned16(a.dx) && aligned16(a.dweight_blocks) &&
                       aligned16(a.dbias_blocks);
  if (a.cols == 0) return cudaSuccess;
  if (a.rows != 0 && a.dtype == DType::kFloat32) {
    backward_of<kCentered, float>(a, aligned, stream);
  } else if (a.rows != 0 && a.dtype == DType::kBFloat16) {
    backward_of<kCentered, __nv_bfloat16>(a, aligned, stream);
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
