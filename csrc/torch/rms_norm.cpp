// Binding of rms_norm: registers the CPU kernels.
#include "ops/rms_norm.h"

#include "torch/norm.h"
#include "cpu/isa.h"

FASTLM_KERNEL_TABLE(RmsNormKernels, rms_norm)

namespace fastlm {
namespace {

Tensor rms_norm(const Tensor& x, const std::optional<Tensor>& weight, double eps, double offset) {
  return norm(rms_norm_kernels().forward, x, weight, std::nullopt, eps, offset);
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual,
                                        const std::optional<Tensor>& weight, double eps,
                                        double offset) {
  return add_norm(rms_norm_kernels().forward, x, residual, weight, std::nullopt, eps, offset);
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad,
                                             const std::optional<Tensor>& grad_summed,
                                             const Tensor& x, const std::optional<Tensor>& weight,
                                             double eps, double offset) {
  const auto [dx, dweight, none] =
      norm_backward(rms_norm_kernels().backward, grad, grad_summed, x, weight, false, eps, offset);
  return {dx, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}

}  // namespace fastlm
