// Contract of linear_cross_entropy's gradients: what a kernel is given. The logits are linear's and
// their softmax cross_entropy's.
#pragma once
#include "common/dtype.h"

namespace fastlm {

// sums[m, n] = sum_k a[k, m] b[k, n], or += where `add`
struct ColumnProduct {
  const void* a;  // element (k, m) at k a_stride_k + m a_stride_m, of which one is 1
  const void* b;  // [k, n], rows b_stride apart
  float* sums;    // [m, n]
  int64_t m, n, k;
  int64_t a_stride_k, a_stride_m, b_stride;
  int64_t width;  // columns of one item of work
  bool add;
  DType dtype;
};

struct LinearCrossEntropyKernels {
  int64_t panel;                // rows of the result in one item of work
  int64_t tile;                 // columns that are taken at a time
  int64_t (*scratch)(int64_t);  // floats of scratch memory for items of so many columns
  // items are panel by panel, then by columns
  void (*product)(const ColumnProduct&, float* scratch, int64_t item_begin, int64_t item_end);
};

}  // namespace fastlm
