// Contract of linear: what a kernel is given.
#pragma once
#include "common/dtype.h"

namespace fastlm {

constexpr int64_t kLinearFewRows = 16;

// y[r,:] = x[r,:] w^T + bias
struct LinearForward {
  const void* x;     // [rows, in]
  const void* w;     // [out, in]
  const void* bias;  // [out], or null
  void* y;           // [rows, out]
  int64_t rows, in, out;
  int64_t w_stride_out, w_stride_in;  // the second is 1, or the first is, for a few rows
  DType dtype;
};

// to[r, c] = from[c, r]
struct Transpose {
  const void* from;  // [cols, rows], rows `ld` apart
  void* to;          // [rows, cols]
  int64_t rows, cols, ld;
  DType dtype;
};

struct LinearKernels {
  int64_t panel;  // weight rows that one item of work covers
  void (*forward)(const LinearForward&, int64_t panel_begin, int64_t panel_end);
  void (*transpose)(const Transpose&, int64_t block_begin, int64_t block_end);  // 16 rows a block
};

}  // namespace fastlm
