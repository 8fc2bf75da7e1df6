// What the bindings with a matrix product share: checks, operands' layouts, the split of the work.
#pragma once
#include "ops/linear.h"
#include "torch/alloc.h"

namespace fastlm {

// The checks that keep a product from reading the wrong memory; the Python side words them better.
inline void check_product(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(w.dim() == 2 && x.dim() >= 1 && x.size(-1) == w.size(1),
                  "w must be [N, K] for x [..., K]");
  STD_TORCH_CHECK(x.scalar_type() == w.scalar_type() && w.is_cpu(), "w must be like x");
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == w.size(0) && bias->is_cpu() &&
                            bias->scalar_type() == x.scalar_type()),
                  "bias must be [N] and like x");
}

// A fresh contiguous CPU tensor [..., out] for x [..., in].
inline Tensor empty_cpu_rows(const Tensor& x, int64_t out) {
  return empty_rows(x, out, aoti_torch_device_type_cpu(), 0);
}

// A contiguous tensor with t's values: t itself, or a copy that is quick for a transposed matrix,
// which is what the gradients pass.
inline Tensor packed(const Tensor& t, const LinearKernels& kernels) {
  if (t.is_contiguous()) return t;
  if (t.dim() != 2 || t.stride(0) != 1) return torch::stable::contiguous(t);
  Tensor copy = empty_cpu({t.size(0), t.size(1)}, t.scalar_type());
  const Transpose args{
      t.const_data_ptr(), copy.mutable_data_ptr(), t.size(0), t.size(1), t.stride(1), dtype_of(t)};
  parallel_rows((args.rows + 15) / 16, args.cols * 128,
                [&](int64_t begin, int64_t end) { kernels.transpose(args, begin, end); });
  return copy;
}

// Runs f over the panels of a product [rows, in] x [out, in]^T; a panel's cost is its weights'
// traffic, or its arithmetic where there are more than about 8 rows.
template <class F>
void parallel_panels(int64_t rows, int64_t in, int64_t out, int64_t panel, DType dtype,
                     const F& f) {
  const int64_t panels = rows == 0 ? 0 : (out + panel - 1) / panel;
  const int64_t size = dtype == DType::kFloat32 ? 4 : 2;
  parallel_rows(panels, panel * in * size * (1 + rows / 8), f);
}

// Whether a weight's rows lie densely; a dimension of size 1 may carry any stride.
inline bool has_dense_rows(const Tensor& w) { return w.stride(1) == 1 || w.size(1) == 1; }

// Whether linear's kernel reads these weights transposed, where they lie.
inline bool is_transposed(const Tensor& w, int64_t rows) {
  return !has_dense_rows(w) && w.stride(0) == 1 && rows <= kLinearFewRows;
}

// The weights in a layout that the kernel reads for so many rows.
inline Tensor readable(const Tensor& w, int64_t rows, const LinearKernels& kernels) {
  return has_dense_rows(w) || is_transposed(w, rows) ? w : packed(w, kernels);
}

// y [rows, out] = x [rows, in] w^T + bias for contiguous x, y and bias.
inline void run_product(const LinearKernels& kernels, const void* x, int64_t rows, const Tensor& w_,
                        const std::optional<Tensor>& bias, void* y) {
  const Tensor w = readable(w_, rows, kernels);
  const int64_t stride_in = is_transposed(w, rows) ? w.stride(1) : 1;
  const LinearForward args{x,         w.const_data_ptr(), data_or_null(bias), y,
                           rows,      w.size(1),          w.size(0),          w.stride(0),
                           stride_in, dtype_of(w)};
  parallel_panels(rows, args.in, args.out, kernels.panel, args.dtype,
                  [&](int64_t begin, int64_t end) { kernels.forward(args, begin, end); });
}

}  // namespace fastlm
