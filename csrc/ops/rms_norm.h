// Contract of rms_norm: what a kernel is given, on any device.
#pragma once
#include "common/dtype.h"

namespace fastlm {

// y[r,:] = s[r,:] * rsqrt(mean(s[r,:]^2) + eps) * (w + offset), s = x or x + residual.
struct RmsNormForward {
  const void* x;         // [rows, cols]
  const void* residual;  // like x, or null
  const void* weight;    // [cols], or null for ones
  void* y;               // like x
  void* summed;          // like x, written when residual is given
  int64_t rows, cols;
  float eps, offset;
  DType dtype, weight_dtype;
};

// dx[r,:] = rstd * (g * w - s * rstd^2 * mean(g * w * s)) + grad_summed; dw = sum over r of g * s *
// rstd
struct RmsNormBackward {
  const void* grad;         // [rows, cols]
  const void* grad_summed;  // like grad, or null
  const void* x;            // the normalised input s
  const void* weight;
  void* dx;
  float* dweight_blocks;  // [blocks, cols] partial sums, or null without weight
  int64_t rows, cols, blocks;
  float eps, offset;
  DType dtype, weight_dtype;
};

struct RmsNormKernels {
  void (*forward)(const RmsNormForward&, int64_t row_begin, int64_t row_end);
  void (*backward)(const RmsNormBackward&, int64_t block_begin, int64_t block_end);
};

// Launchers of csrc/cuda/rms_norm.cu: queue the kernels on a cudaStream_t, return a cudaError_t.
namespace cuda {
int rms_norm_forward(const RmsNormForward&, void* stream);
// dweight [cols] of the weight's type, or null; it is the sum of dweight_blocks.
int rms_norm_backward(const RmsNormBackward&, void* dweight, void* stream);
// How many partial sums `dweight_blocks` is to hold for an input of this shape.
int64_t rms_norm_runs(int64_t rows, int64_t cols);
}  // namespace cuda

}  // namespace fastlm
