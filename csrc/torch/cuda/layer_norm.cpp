// Binding of layer_norm's CUDA kernels: registers them.
#include "ops/layer_norm.h"

#include "torch/cuda/norm.h"

namespace fastlm {
namespace {

Tensor layer_norm(const Tensor& x, const std::optional<Tensor>& weight,
                  const std::optional<Tensor>& bias, double eps) {
  return cuda::norm("layer_norm", cuda::layer_norm_forward, x, std::nullopt, weight, bias, eps, 0.0,
                    nullptr);
}

std::tuple<Tensor, Tensor> add_layer_norm(const Tensor& x, const Tensor& residual,
                                          const std::optional<Tensor>& weight,
                                          const std::optional<Tensor>& bias, double eps) {
  Tensor summed;
  Tensor y = cuda::norm("layer_norm", cuda::layer_norm_forward, x, residual, weight, bias, eps, 0.0,
                        &summed);
  return {y, summed};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& grad,
                                                       const std::optional<Tensor>& grad_summed,
                                                       const Tensor& x,
                                                       const std::optional<Tensor>& weight,
                                                       bool bias, double eps) {
  return cuda::norm_backward("layer_norm_backward", cuda::layer_norm_backward,
                             cuda::layer_norm_runs, grad, grad_summed, x, weight, bias, eps, 0.0);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlm, CUDA, m) {
  m.impl("layer_norm", TORCH_BOX(&layer_norm));
  m.impl("add_layer_norm", TORCH_BOX(&add_layer_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
}

}  // namespace fastlm
