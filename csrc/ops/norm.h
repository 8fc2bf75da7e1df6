// Contract that rms_norm and layer_norm share: what a kernel is given, on any device.
#pragma once
#include "common/dtype.h"

namespace fastlm {

// y[r,:] = (s[r,:] - mean) * rstd * (weight + offset) + bias, s = x or x + residual;
// rms_norm has mean = 0 and no bias, layer_norm no offset.
struct NormForward {
  const void* x;         // [rows, cols]
  const void* residual;  // like x, or null
  const void* weight;    // [cols], or null for ones
  void* y;               // like x
  void* summed;          // like x, written when residual is given
  int64_t rows, cols;
  float eps, offset;
  DType dtype, weight_dtype;   // weight_dtype: fp32 or dtype
  const void* bias = nullptr;  // [cols] of the weight's type, or null for zeros
  bool past_cache = false;     // store y past the caches
  float* pieces = nullptr;     // [rows, norm_pieces, 4] for sums of pieces, where rows are cut
};

// dx[r,:] = rstd * (gw - mean(gw) - h * mean(gw * h)) + grad_summed with h = (s - mean) * rstd and
// gw = grad * (weight + offset); dweight = sum over r of grad * h, dbias = sum over r of grad.
// rms_norm has mean = mean(gw) = 0.
struct NormBackward {
  const void* grad;         // [rows, cols]
  const void* grad_summed;  // like grad, or null
  const void* x;            // the normalised input s
  const void* weight;
  void* dx;
  float* dweight_blocks;  // [blocks, cols] partial sums, or null without weight
  int64_t rows, cols, blocks;
  float eps, offset;
  DType dtype, weight_dtype;
  float* dbias_blocks = nullptr;  // like dweight_blocks, or null without bias
  bool past_cache = false;        // store dx past the caches
  float* pieces = nullptr;        // like the forward pass's
};

// In how many pieces of kNormPiece columns a GPU takes each row, or 1: so wide and so few that
// whole rows, one a multiprocessor, would leave half of a large GPU idle for longer than a launch
// takes. A number of the shape alone, so that sums have the same order on every GPU.
constexpr int64_t kNormPiece = 1024;
inline int64_t norm_pieces(int64_t rows, int64_t cols) {
  return rows <= 64 && cols >= 32 * kNormPiece ? (cols + kNormPiece - 1) / kNormPiece : 1;
}

struct NormKernels {
  void (*forward)(const NormForward&, int64_t row_begin, int64_t row_end);
  void (*backward)(const NormBackward&, int64_t block_begin, int64_t block_end);
};

}  // namespace fastlm
