// Binding of linear: checks and allocates, splits the weight's rows over threads.
#include "ops/linear.h"

#include "torch/product.h"
#include "cpu/isa.h"

FASTLM_KERNEL_TABLE(LinearKernels, linear)

namespace fastlm {
namespace {

Tensor linear(const Tensor& x_, const Tensor& w, const std::optional<Tensor>& bias) {
  check_product(x_, w, bias);
  const Rows x = rows_of(x_);
  Tensor y = empty_cpu_rows(x_, w.size(0));
  run_product(linear_kernels(), x.side, x.count, readable(w), dense(bias), y.mutable_data_ptr());
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, m) { m.impl("linear", TORCH_BOX(&linear)); }

}  // namespace fastlm
