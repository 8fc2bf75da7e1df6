// Contract of rms_norm: y[r,:] = s[r,:] * rsqrt(mean(s[r,:]^2) + eps) * (weight + offset).
#pragma once
#include "ops/norm.h"

namespace fastlm {

using RmsNormForward = NormForward;
using RmsNormBackward = NormBackward;
using RmsNormKernels = NormKernels;

// Launchers of csrc/cuda/rms_norm.cu: queue the kernels on a cudaStream_t, return a cudaError_t.
namespace cuda {
int rms_norm_forward(const RmsNormForward&, void* stream);
// dweight [cols] of the weight's type, or null; it is the sum of dweight_blocks.
int rms_norm_backward(const RmsNormBackward&, void* dweight, void* stream);
// How many partial sums `dweight_blocks` is to hold for an input of this shape.
int64_t rms_norm_runs(int64_t rows, int64_t cols);
}  // namespace cuda

}  // namespace fastlm
