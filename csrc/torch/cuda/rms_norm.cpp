// Binding of rms_norm's CUDA kernels: registers them.
#include "ops/rms_norm.h"

#include "torch/cuda/norm.h"

namespace fastlm {
namespace {

Tensor rms_norm(const Tensor& x, const std::optional<Tensor>& weight, double eps, double offset) {
  return cuda::norm("rms_norm", cuda::rms_norm_forward, x, std::nullopt, weight, std::nullopt, eps,
                    offset, nullptr);
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual,
                                        const std::optional<Tensor>& weight, double eps,
                                        double offset) {
  Tensor summed;
  Tensor y = cuda::norm("rms_norm", cuda::rms_norm_forward, x, residual, weight, std::nullopt, eps,
                        offset, &summed);
  return {y, summed};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad,
                                             const std::optional<Tensor>& grad_summed,
                                             const Tensor& x, const std::optional<Tensor>& weight,
                                             double eps, double offset) {
  const auto launch = [](const NormBackward& args, void* dweight, void*, void* stream) {
    return cuda::rms_norm_backward(args, dweight, stream);
  };
  auto [dx, dweight, none] = cuda::norm_backward("rms_norm_backward", launch, cuda::rms_norm_runs,
                                                 grad, grad_summed, x, weight, false, eps, offset);
  return {dx, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlm, CUDA, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}

}  // namespace fastlm
