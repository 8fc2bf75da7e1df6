// Binding of layer_norm: registers the CPU kernels.
#include "ops/layer_norm.h"

#include "torch/norm.h"
#include "cpu/isa.h"

FASTLM_KERNEL_TABLE(LayerNormKernels, layer_norm)

namespace fastlm {
namespace {

Tensor layer_norm(const Tensor& x, const std::optional<Tensor>& weight,
                  const std::optional<Tensor>& bias, double eps) {
  return norm(layer_norm_kernels().forward, x, weight, bias, eps, 0.0);
}

std::tuple<Tensor, Tensor> add_layer_norm(const Tensor& x, const Tensor& residual,
                                          const std::optional<Tensor>& weight,
                                          const std::optional<Tensor>& bias, double eps) {
  return add_norm(layer_norm_kernels().forward, x, residual, weight, bias, eps, 0.0);
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& grad,
                                                       const std::optional<Tensor>& grad_summed,
                                                       const Tensor& x,
                                                       const std::optional<Tensor>& weight,
                                                       bool bias, double eps) {
  return norm_backward(layer_norm_kernels().backward, grad, grad_summed, x, weight, bias, eps, 0.0);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, m) {
  m.impl("layer_norm", TORCH_BOX(&layer_norm));
  m.impl("add_layer_norm", TORCH_BOX(&add_layer_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
}

}  // namespace fastlm
