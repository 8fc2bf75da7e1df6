// Binding of linear: checks and allocates, splits the weight's rows over threads.
#include "ops/linear.h"

#include "torch/alloc.h"
#include "torch/product.h"
#include "cpu/isa.h"

FASTLM_KERNEL_TABLE(LinearKernels, linear)

namespace fastlm {
namespace {

// A contiguous tensor with t's values: t itself, or a copy that is quick for a transposed matrix,
// which is what the gradients pass.
Tensor packed(const Tensor& t) {
  if (t.is_contiguous()) return t;
  if (t.dim() != 2 || t.stride(0) != 1) return torch::stable::contiguous(t);
  Tensor copy = empty_cpu({t.size(0), t.size(1)}, t.scalar_type());
  const Transpose args{
      t.const_data_ptr(), copy.mutable_data_ptr(), t.size(0), t.size(1), t.stride(1), dtype_of(t)};
  const auto kernel = linear_kernels().transpose;
  parallel_rows((args.rows + 15) / 16, args.cols * 128,
                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return copy;
}

Tensor linear(const Tensor& x_, const Tensor& w_, const std::optional<Tensor>& bias_) {
  check_product(x_, w_, bias_);
  const Tensor x = packed(x_);
  const auto bias = dense(bias_);
  const int64_t in = w_.size(1), out = w_.size(0);
  Tensor y = empty_cpu_rows(x, out);
  const int64_t rows = out == 0 ? 0 : y.numel() / out;
  const bool transposed = w_.stride(0) == 1 && rows <= kLinearFewRows;
  const Tensor w = w_.stride(1) == 1 || transposed ? w_ : packed(w_);
  const LinearForward args{x.const_data_ptr(),
                           w.const_data_ptr(),
                           data_or_null(bias),
                           y.mutable_data_ptr(),
                           rows,
                           in,
                           out,
                           w.stride(0),
                           w.stride(1),
                           dtype_of(x)};
  const LinearKernels& kernels = linear_kernels();
  parallel_panels(rows, in, out, kernels.panel, args.dtype,
                  [&](int64_t begin, int64_t end) { kernels.forward(args, begin, end); });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, m) { m.impl("linear", TORCH_BOX(&linear)); }

}  // namespace fastlm
