// rms_norm forward and backward.
// Computes   y[r,:] = s[r,:] * rsqrt(mean(s[r,:]^2) + eps) * (w + offset), s = x (+ residual)
// Algorithm  a row stays in the registers of its threads between the sum and the scaling;
//            backward sums s*s and g*w*s together, adds to its own dw in registers over a run of
//            rows, writes one partial dw per run; a second kernel sums the partials in order
// Tile       8 threads a row (16 rows a block), 32 (4 rows), or a block of 128, 256 or 512 threads
// a
//            row, 4 vectors of 16 bytes each; longer or unaligned rows are read twice instead
// Traffic    forward reads x (and residual) once, writes y (and the sum); backward reads g and s
//            once, writes dx and runs * cols floats
// Numerics   fp32 sums in a fixed order that depends on the shape alone, one rounding to the output
// Source     arXiv:1910.07467, equation 4
#include "ops/rms_norm.h"

#include <cuda_runtime.h>

#include "reduce.cuh"
#include "vec.cuh"

namespace fastlm {
namespace {

// How a row is laid over threads. kHeld vectors of kVec elements per thread stay in registers;
// kHeld = 0 reads rows of any length, a second time for the second pass.
template <int kVec_, int kThreads_, int kHeld_>
struct Layout {
  static constexpr int kVec = kVec_;
  static constexpr int kThreads = kThreads_;                      // that share a row
  static constexpr int kBlock = kThreads < 128 ? 128 : kThreads;  // threads of a block
  static constexpr int kRows = kBlock / kThreads;                 // rows of a block
  static constexpr int kHeld = kHeld_;
  static constexpr int kStep = kThreads * kVec;
};

// Element offsets a thread visits in a row: f(vector index, offset).
template <class L, class F>
__device__ inline void for_vectors(int64_t cols, F&& f) {
  const int first = static_cast<int>(threadIdx.x) % L::kThreads * L::kVec;
  if constexpr (L::kHeld > 0) {
#pragma unroll
    for (int j = 0; j < L::kHeld; ++j) {
      const int i = first + j * L::kStep;
      if (i < cols) f(j, static_cast<int64_t>(i));
    }
  } else {
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

// (w + offset) of the columns at i; ones without a weight.
template <class W, int N>
__device__ inline void load_scale(const void* weight, float offset, int64_t i, float (&scale)[N]) {
  Vec<W, N> w;
  if (weight != nullptr) w.load(static_cast<const W*>(weight) + i);
#pragma unroll
  for (int k = 0; k < N; ++k) scale[k] = weight == nullptr ? 1.0f : w[k] + offset;
}

template <class T, class W, class L>
__global__ void __launch_bounds__(L::kBlock) forward_kernel(const RmsNormForward a) {
  __shared__ float shared[L::kBlock / 32];
  constexpr bool kKeep = L::kHeld > 0;
  constexpr int kVec = L::kVec;
  const int64_t r = static_cast<int64_t>(blockIdx.x) * L::kRows + threadIdx.x / L::kThreads;
  const int64_t cols = r < a.rows ? a.cols : 0;  // an idle thread still takes part in the sums
  const T* x = static_cast<const T*>(a.x) + r * a.cols;
  const T* residual = static_cast<const T*>(a.residual);
  T* summed = static_cast<T*>(a.summed) + r * a.cols;
  T* y = static_cast<T*>(a.y) + r * a.cols;

  Vec<T, kVec> s[kKeep ? L::kHeld : 1];
  float squares[1] = {0.0f};
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
    for (int k = 0; k < kVec; ++k) squares[0] = fmaf(s[j][k], s[j][k], squares[0]);
  });
  sum_over<L::kThreads>(squares, shared);
  const float rstd = rstd_of(squares[0], a.cols, a.eps);

  const T* again = residual != nullptr ? summed : x;
  for_vectors<L>(cols, [&](int j, int64_t i) {
    float scale[kVec];
    load_scale<W>(a.weight, a.offset, i, scale);
    if constexpr (!kKeep) s[j].load(again + i);
#pragma unroll
    for (int k = 0; k < kVec; ++k) s[j].set(k, s[j][k] * rstd * scale[k]);
    s[j].store(y + i);
  });
}

// One run of rows per kThreads threads; run b covers rows [rows*b/runs, rows*(b+1)/runs).
template <class T, class W, class L>
__global__ void __launch_bounds__(L::kBlock, 512 / L::kBlock)
    backward_kernel(const RmsNormBackward a) {
  __shared__ float shared[2 * (L::kBlock / 32)];
  constexpr bool kKeep = L::kHeld > 0;
  constexpr int kHeld = kKeep ? L::kHeld : 1, kVec = L::kVec;
  const int64_t run = static_cast<int64_t>(blockIdx.x) * L::kRows + threadIdx.x / L::kThreads;
  const bool active = run < a.blocks;
  const int64_t begin = active ? a.rows * run / a.blocks : 0;
  const int64_t end = active ? a.rows * (run + 1) / a.blocks : 0;
  const int64_t longest = (a.rows + a.blocks - 1) / a.blocks;  // the same for every thread
  const T* extra = static_cast<const T*>(a.grad_summed);
  float* dw = a.dweight_blocks == nullptr ? nullptr : a.dweight_blocks + run * a.cols;

  Vec<float, kVec> sums[kHeld] = {};  // this thread's columns of the run's dw
  for (int64_t step = 0; step < longest; ++step) {
    const int64_t r = begin + step;
    const int64_t cols = r < end ? a.cols : 0;
    const T* x = static_cast<const T*>(a.x) + r * a.cols;
    const T* grad = static_cast<const T*>(a.grad) + r * a.cols;
    T* dx = static_cast<T*>(a.dx) + r * a.cols;

    Vec<T, kVec> s[kHeld], g[kHeld];
    float totals[2] = {0.0f, 0.0f};  // of s*s and g*w*s
    for_vectors<L>(cols, [&](int j, int64_t i) {
      float scale[kVec];
      s[j].load(x + i);
      g[j].load(grad + i);
      load_scale<W>(a.weight, a.offset, i, scale);
#pragma unroll
      for (int k = 0; k < kVec; ++k) {
        totals[0] = fmaf(s[j][k], s[j][k], totals[0]);
        totals[1] = fmaf(g[j][k] * scale[k], s[j][k], totals[1]);
      }
    });
    sum_over<L::kThreads>(totals, shared);
    const float rstd = rstd_of(totals[0], a.cols, a.eps);
    const float slope = rstd * rstd * totals[1] / static_cast<float>(a.cols);

    for_vectors<L>(cols, [&](int j, int64_t i) {
      if constexpr (!kKeep) {  // no registers for all columns: read again, the partial in memory
        s[j].load(x + i);
        g[j].load(grad + i);
        if (dw != nullptr && step > 0)
          sums[j].load(dw + i);
        else
          sums[j] = {};
      }
      float scale[kVec];
      load_scale<W>(a.weight, a.offset, i, scale);
      Vec<T, kVec> more = {}, out;
      if (extra != nullptr) more.load(extra + r * a.cols + i);
#pragma unroll
      for (int k = 0; k < kVec; ++k) {
        out.set(k, fmaf(rstd, fmaf(g[j][k], scale[k], -s[j][k] * slope), more[k]));
        sums[j].v[k] = fmaf(g[j][k] * rstd, s[j][k], sums[j].v[k]);
      }
      out.store(dx + i);
      if constexpr (!kKeep) {
        if (dw != nullptr) sums[j].store(dw + i);
      }
    });
  }
  if constexpr (kKeep) {
    if (dw != nullptr && active) {
      for_vectors<L>(a.cols, [&](int j, int64_t i) { sums[j].store(dw + i); });
    }
  }
}

// dweight[c] = sum over runs of partial[run, c]: 32 columns a block, 32 warps over the runs.
template <class W>
__global__ void __launch_bounds__(1024)
    sum_runs_kernel(const float* partial, W* dweight, int64_t runs, int64_t cols) {
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
  if (lane == 0 && column < cols) from_float(total[0], dweight + column);
}

int check_launch() { return static_cast<int>(cudaGetLastError()); }

unsigned grid_of(int64_t items, int per_block) {
  return static_cast<unsigned>((items + per_block - 1) / per_block);
}

template <class T, class W>
struct Forward {
  const RmsNormForward& args;
  cudaStream_t stream;
  template <class L>
  int run() const {
    forward_kernel<T, W, L><<<grid_of(args.rows, L::kRows), L::kBlock, 0, stream>>>(args);
    return check_launch();
  }
};

template <class T, class W>
struct Backward {
  const RmsNormBackward& args;
  cudaStream_t stream;
  template <class L>
  int run() const {
    backward_kernel<T, W, L><<<grid_of(args.blocks, L::kRows), L::kBlock, 0, stream>>>(args);
    return check_launch();
  }
};

// Picks the smallest layout that holds a row in registers.
template <class T, class Launch>
int with_layout(int64_t cols, bool aligned, const Launch& launch) {
  constexpr int kVec = kVector<T>;
  if (!aligned || cols % kVec != 0) {
    if (cols <= 256) return launch.template run<Layout<1, 32, 8>>();
    return launch.template run<Layout<1, 256, 0>>();
  }
  const int64_t vectors = cols / kVec;
  if (vectors <= 8 * 4) return launch.template run<Layout<kVec, 8, 4>>();
  if (vectors <= 32 * 4) return launch.template run<Layout<kVec, 32, 4>>();
  if (vectors <= 128 * 4) return launch.template run<Layout<kVec, 128, 4>>();
  if (vectors <= 256 * 4) return launch.template run<Layout<kVec, 256, 4>>();
  if (vectors <= 512 * 4) return launch.template run<Layout<kVec, 512, 4>>();
  return launch.template run<Layout<kVec, 512, 0>>();
}

template <template <class, class> class Launch, class Args>
int dispatch(const Args& a, bool aligned, cudaStream_t stream) {
  if (a.rows == 0 || a.cols == 0) return cudaSuccess;
  if (a.dtype == DType::kFloat32) {
    return with_layout<float>(a.cols, aligned, Launch<float, float>{a, stream});
  }
  if (a.dtype != DType::kBFloat16) return cudaErrorInvalidValue;
  if (a.weight != nullptr && a.weight_dtype == DType::kFloat32) {
    return with_layout<__nv_bfloat16>(a.cols, aligned, Launch<__nv_bfloat16, float>{a, stream});
  }
  return with_layout<__nv_bfloat16>(a.cols, aligned,
                                    Launch<__nv_bfloat16, __nv_bfloat16>{a, stream});
}

}  // namespace

namespace cuda {

// At least 4 rows each, and no more than fill a large GPU a few times. A number of the shape alone,
// so that the weight's gradient has the same bits on every GPU.
int64_t rms_norm_runs(int64_t rows, int64_t cols) {
  const int64_t most = cols < 1024 ? (1 << 20) / (cols > 0 ? cols : 1) : 1056;
  const int64_t runs = (rows + 3) / 4;
  return runs < most ? runs : most;
}

int rms_norm_forward(const RmsNormForward& a, void* stream) {
  const bool aligned = aligned16(a.x) && aligned16(a.residual) && aligned16(a.weight) &&
                       aligned16(a.y) && aligned16(a.summed);
  return dispatch<Forward>(a, aligned, static_cast<cudaStream_t>(stream));
}

int rms_norm_backward(const RmsNormBackward& a, void* dweight, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  const bool aligned = aligned16(a.grad) && aligned16(a.grad_summed) && aligned16(a.x) &&
                       aligned16(a.weight) && aligned16(a.dx) && aligned16(a.dweight_blocks);
  const int status = dispatch<Backward>(a, aligned, stream);
  if (status != cudaSuccess || dweight == nullptr || a.cols == 0) return status;
  const int64_t runs = a.rows == 0 ? 0 : a.blocks;
  const unsigned grid = grid_of(a.cols, 32);
  if (a.weight_dtype == DType::kFloat32) {
    sum_runs_kernel<<<grid, 1024, 0, stream>>>(a.dweight_blocks, static_cast<float*>(dweight), runs,
                                               a.cols);
  } else {
    sum_runs_kernel<<<grid, 1024, 0, stream>>>(a.dweight_blocks,
                                               static_cast<__nv_bfloat16*>(dweight), runs, a.cols);
  }
  return check_launch();
}

}  // namespace cuda
}  // namespace fastlm
