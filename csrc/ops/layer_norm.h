// Contract of layer_norm: y[r,:] = (s[r,:] - mean) * rsqrt(var(s[r,:]) + eps) * weight + bias.
#pragma once
#include "ops/norm.h"

namespace fastlm {

using LayerNormForward = NormForward;
using LayerNormBackward = NormBackward;
using LayerNormKernels = NormKernels;

// Launchers of csrc/cuda/layer_norm.cu: queue the kernels on a cudaStream_t, return a cudaError_t.
namespace cuda {
int layer_norm_forward(const LayerNormForward&, void* stream);
// dweight and dbias [cols] of the weight's type, or null: the sums of their blocks.
int layer_norm_backward(const LayerNormBackward&, void* dweight, void* dbias, void* stream);
// How many partial sums the blocks are to hold for an input of this shape.
int64_t layer_norm_runs(int64_t rows, int64_t cols);
}  // namespace cuda

}  // namespace fastlm
