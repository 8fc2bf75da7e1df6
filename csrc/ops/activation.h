// Contract of activation: what a kernel is given, on any device.
#pragma once
#include "common/dtype.h"
#include "ops/activation_kind.h"

namespace fastlm {

// y = act(x), or act(x) * up where up is given; strides are between rows, in elements.
struct ActivationForward {
  const void* x;   // [rows, cols]
  const void* up;  // like x, or null
  void* y;         // [rows, cols], dense
  int64_t rows, cols, x_stride, up_stride;
  Activation act;
  DType dtype;
};

// dx = grad * act'(x) (* up), dup = grad * act(x)
struct ActivationBackward {
  const void* grad;  // [rows, cols], dense
  const void* x;
  const void* up;
  void* dx;
  void* dup;  // like dx; null where up is
  int64_t rows, cols, x_stride, up_stride, dx_stride, dup_stride;
  Activation act;
  DType dtype;
};

// A range of rows, or where there is one row a range of its columns.
struct ActivationKernels {
  void (*forward)(const ActivationForward&, int64_t row_begin, int64_t row_end, int64_t col_begin,
                  int64_t col_end);
  void (*backward)(const ActivationBackward&, int64_t row_begin, int64_t row_end, int64_t col_begin,
                   int64_t col_end);
};

// Launchers of csrc/cuda/activation.cu: queue the kernel on a cudaStream_t, return a cudaError_t.
namespace cuda {
int activation_forward(const ActivationForward&, void* stream);
int activation_backward(const ActivationBackward&, void* stream);
}  // namespace cuda

}  // namespace fastlm
