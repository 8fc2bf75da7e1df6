// Binding of rms_norm's CUDA kernels: allocates, launches on the current stream, registers.
#include "ops/rms_norm.h"

#include <tuple>

#include "torch/cuda/device.h"

namespace fastlm {
namespace {

void forward(const cuda::OnDevice& device, const Tensor& x, const std::optional<Tensor>& residual,
             const std::optional<Tensor>& weight, double eps, double offset, const Tensor& y,
             Tensor* summed) {
  const int64_t cols = x.size(-1);
  const RmsNormForward args{x.const_data_ptr(),
                            data_or_null(residual),
                            data_or_null(weight),
                            y.mutable_data_ptr(),
                            summed == nullptr ? nullptr : summed->mutable_data_ptr(),
                            cols == 0 ? 0 : x.numel() / cols,
                            cols,
                            static_cast<float>(eps),
                            static_cast<float>(offset),
                            dtype_of(x),
                            dtype_or_float(weight)};
  cuda::check(cuda::rms_norm_forward(args, device.stream()), "rms_norm");
}

Tensor rms_norm(const Tensor& x_, const std::optional<Tensor>& weight, double eps, double offset) {
  const cuda::OnDevice device(x_);
  const Tensor x = dense(x_);
  Tensor y = device.empty_like(x);
  forward(device, x, std::nullopt, dense(weight), eps, offset, y, nullptr);
  return y;
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x_, const Tensor& residual,
                                        const std::optional<Tensor>& weight, double eps,
                                        double offset) {
  const cuda::OnDevice device(x_);
  const Tensor x = dense(x_);
  Tensor y = device.empty_like(x), summed = device.empty_like(x);
  forward(device, x, dense(residual), dense(weight), eps, offset, y, &summed);
  return {y, summed};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad_,
                                             const std::optional<Tensor>& grad_summed_,
                                             const Tensor& x_, const std::optional<Tensor>& weight_,
                                             double eps, double offset) {
  const cuda::OnDevice device(x_);
  const Tensor grad = dense(grad_), x = dense(x_);
  const auto grad_summed = dense(grad_summed_), weight = dense(weight_);
  const int64_t cols = x.size(-1);
  const int64_t rows = cols == 0 ? 0 : x.numel() / cols;
  const int64_t runs = cuda::rms_norm_runs(rows, cols);
  Tensor dx = device.empty_like(x);
  Tensor partial = device.empty({weight ? runs : 0, cols}, ScalarType::Float);
  const RmsNormBackward args{grad.const_data_ptr(),
                             data_or_null(grad_summed),
                             x.const_data_ptr(),
                             data_or_null(weight),
                             dx.mutable_data_ptr(),
                             weight ? static_cast<float*>(partial.mutable_data_ptr()) : nullptr,
                             rows,
                             cols,
                             runs,
                             static_cast<float>(eps),
                             static_cast<float>(offset),
                             dtype_of(x),
                             dtype_or_float(weight)};
  Tensor dweight = weight ? device.empty_like(*weight) : partial;
  void* dweight_data = weight ? dweight.mutable_data_ptr() : nullptr;
  cuda::check(cuda::rms_norm_backward(args, dweight_data, device.stream()), "rms_norm_backward");
  return {dx, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlm, CUDA, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}

}  // namespace fastlm
