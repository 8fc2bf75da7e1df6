// Contract of linear: what its kernels are given, for a few rows and for many.
#pragma once
#include "common/dtype.h"

namespace fastlm {

constexpr int64_t kLinearFewRows = 16;

// y[r,:] = x[r,:] w^T + bias for a few rows
struct LinearForward {
  const void* x;     // [rows, in]
  const void* w;     // [out, in]
  const void* bias;  // [out], or null
  void* y;           // [rows, out]
  int64_t rows, in, out;
  int64_t w_stride_out, w_stride_in;  // of which one is 1
  DType dtype;
};

// One side of a product of many rows: element (i, k) at p[i * along + k * deep], of which one is 1.
struct Operand {
  const void* p;
  int64_t along, deep;
};

// y[m, n] = sum_k a(m, k) b(n, k) + bias[n], or y += the sums, which then are fp32
struct Product {
  Operand a, b;
  const void* bias;  // [n], or null
  void* y;           // [m, n], rows ld apart; of dtype, or fp32
  int64_t m, n, k, ld;
  bool add, sums;  // sums: y is fp32 whatever dtype
  DType dtype;
};

// Rows [m0, m1) and columns [n0, n1) of the result: one item of work.
struct Region {
  int64_t m0, m1, n0, n1;
};

struct LinearKernels {
  int64_t panel;  // weight rows that one item of work covers
  void (*forward)(const LinearForward&, int64_t panel_begin, int64_t panel_end);
  int64_t rows, cols;                  // of a tile of a product of many rows
  int64_t (*scratch)(const Product&);  // floats of scratch memory for a region
  void (*product)(const Product&, const Region&, float* scratch);
};

}  // namespace fastlm
