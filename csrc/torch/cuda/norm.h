// What the CUDA bindings of rms_norm and layer_norm share: allocation, launches.
#pragma once
#include "torch/norm.h"

#include "torch/cuda/device.h"

namespace fastlm::cuda {

// Where rows are cut: memory for the sums of their pieces, held by what is returned.
template <class Args>
Tensor cut_rows(const OnDevice& device, Args& args) {
  const int64_t pieces = norm_pieces(args.rows, args.cols);
  if (pieces == 1) return Tensor();
  Tensor sums = device.empty({args.rows, pieces, 4}, ScalarType::Float);
  args.pieces = static_cast<float*>(sums.mutable_data_ptr());
  return sums;
}

// y = norm(x), or with `residual` norm(x + residual), the sum being written to `summed`.
template <class Launch>
Tensor norm(const char* op, const Launch& launch, const Tensor& x_,
            const std::optional<Tensor>& residual_, const std::optional<Tensor>& weight_,
            const std::optional<Tensor>& bias_, double eps, double offset, Tensor* summed) {
  if (residual_) check_like("residual", *residual_, x_);
  const OnDevice device(x_);
  const Tensor x = dense(x_);
  const auto residual = dense(residual_), weight = dense(weight_), bias = dense(bias_);
  Tensor y = device.empty_like(x);
  if (residual) *summed = device.empty_like(x);
  NormForward args = forward_arguments(x, residual, weight, bias, eps, offset, y,
                                       residual ? summed->mutable_data_ptr() : nullptr);
  const Tensor sums = cut_rows(device, args);
  check(launch(args, device.stream()), op);
  return y;
}

// dx, dweight and dbias, the last two empty where there is no weight or bias.
template <class Launch>
std::tuple<Tensor, Tensor, Tensor> norm_backward(
    const char* op, const Launch& launch, int64_t (*runs_of)(int64_t, int64_t), const Tensor& grad_,
    const std::optional<Tensor>& grad_summed_, const Tensor& x_,
    const std::optional<Tensor>& weight_, bool bias, double eps, double offset) {
  check_backward(grad_, grad_summed_, x_, weight_, bias);
  const OnDevice device(x_);
  const Tensor grad = dense(grad_), x = dense(x_);
  const auto grad_summed = dense(grad_summed_), weight = dense(weight_);
  const Rows shape(x);
  const int64_t runs = runs_of(shape.rows, shape.cols);
  const auto partial = [&](bool wanted) {
    return device.empty({wanted ? runs : 0, shape.cols}, ScalarType::Float);
  };
  Tensor dx = device.empty_like(x);
  Tensor dw_runs = partial(weight.has_value()), db_runs = partial(bias);
  NormBackward args = backward_arguments(grad, grad_summed, x, weight, dx, runs, eps, offset);
  if (weight) args.dweight_blocks = static_cast<float*>(dw_runs.mutable_data_ptr());
  if (bias) args.dbias_blocks = static_cast<float*>(db_runs.mutable_data_ptr());
  const Tensor sums = cut_rows(device, args);
  Tensor dweight = weight ? device.empty_like(*weight) : dw_runs;
  Tensor dbias = bias ? device.empty_like(*weight) : db_runs;
  check(launch(args, weight ? dweight.mutable_data_ptr() : nullptr,
               bias ? dbias.mutable_data_ptr() : nullptr, device.stream()),
        op);
  return {dx, dweight, dbias};
}

}  // namespace fastlm::cuda
