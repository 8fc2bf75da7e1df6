// Contract of cross_entropy: what a kernel is given, on any device.
#pragma once
#include "common/dtype.h"

namespace fastlm {

// With z a row of logits, lse = log(sum(e^z)), t its target, e the smoothing, w the class weights
// (ones where null), loss = w[t] ((1 - e) (lse - z[t]) + z_loss lse^2) + e / V sum_c w[c] (lse -
// z[c])
struct CrossEntropyForward {
  const void* logits;         // [rows, classes]
  const int64_t* target;      // [rows], in [0, classes) or ignore_index
  const float* class_weight;  // [classes], or null
  float* loss;                // [rows], 0 where ignored
  float* softmax;             // [rows, 2]: largest logit, sum of e^(z - largest)
  int64_t rows, classes, ignore_index;
  float class_weight_sum;  // classes where class_weight is null
  float smoothing, z_loss;
  DType dtype;
};

// grad[r,c] = scale[r] dloss[r] / dz[r,c]
struct CrossEntropyBackward {
  const void* logits;
  const int64_t* target;
  const float* class_weight;
  const float* softmax;
  const float* scale;  // [rows]
  void* grad;          // like logits
  int64_t rows, classes, ignore_index;
  float class_weight_sum;
  float smoothing, z_loss;
  DType dtype;
};

struct CrossEntropyKernels {
  void (*forward)(const CrossEntropyForward&, int64_t row_begin, int64_t row_end);
  void (*backward)(const CrossEntropyBackward&, int64_t row_begin, int64_t row_end);
};

}  // namespace fastlm
