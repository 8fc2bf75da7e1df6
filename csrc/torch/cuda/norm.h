// What the CUDA bindings of rms_norm and layer_norm share: checks, allocation, contracts.
#pragma once
#include "ops/norm.h"

#include <tuple>

#include "torch/cuda/device.h"

namespace fastlm::cuda {

struct NormShape {
  int64_t rows, cols;
  explicit NormShape(const Tensor& x) : cols(x.dim() > 0 ? x.size(-1) : 0) {
    STD_TORCH_CHECK(x.dim() > 0, "x must be of rank 1 or more");
    rows = cols == 0 ? 0 : x.numel() / cols;
  }
};

// The messages users see come from fastlm/ops/; these keep a kernel from reading the wrong memory.
inline void check_like(const char* name, const std::optional<Tensor>& t, const Tensor& x) {
  STD_TORCH_CHECK(
      !t || (same_place(*t, x) && t->scalar_type() == x.scalar_type() && same_sizes(*t, x)), name,
      " does not fit x");
}
inline void check_vector(const char* name, const std::optional<Tensor>& t, const Tensor& x,
                         DType dtype) {
  STD_TORCH_CHECK(
      !t || (same_place(*t, x) && t->dim() == 1 && t->size(0) == x.size(-1) &&
             dtype_of(*t) == dtype && (dtype == DType::kFloat32 || dtype == dtype_of(x))),
      name, " does not fit x");
}

// y = norm(x), or with `residual` norm(x + residual), the sum being written to `summed`.
template <class Launch>
Tensor norm(const char* op, const Launch& launch, const Tensor& x_,
            const std::optional<Tensor>& residual_, const std::optional<Tensor>& weight_,
            const std::optional<Tensor>& bias_, double eps, double offset, Tensor* summed) {
  const NormShape shape(x_);
  const DType weight_dtype = dtype_or_float(weight_ ? weight_ : bias_);
  check_like("residual", residual_, x_);
  check_vector("weight", weight_, x_, weight_dtype);
  check_vector("bias", bias_, x_, weight_dtype);
  const OnDevice device(x_);
  const Tensor x = dense(x_);
  const auto residual = dense(residual_), weight = dense(weight_), bias = dense(bias_);
  Tensor y = device.empty_like(x);
  if (residual) *summed = device.empty_like(x);
  const NormForward args{x.const_data_ptr(),
                         data_or_null(residual),
                         data_or_null(weight),
                         y.mutable_data_ptr(),
                         residual ? summed->mutable_data_ptr() : nullptr,
                         shape.rows,
                         shape.cols,
                         static_cast<float>(eps),
                         static_cast<float>(offset),
                         dtype_of(x),
                         weight_dtype,
                         data_or_null(bias)};
  check(launch(args, device.stream()), op);
  return y;
}

// dx, dweight and dbias, the last two empty where there is no weight or bias.
template <class Launch>
std::tuple<Tensor, Tensor, Tensor> norm_backward(
    const char* op, const Launch& launch, int64_t (*runs_of)(int64_t, int64_t), const Tensor& grad_,
    const std::optional<Tensor>& grad_summed_, const Tensor& x_,
    const std::optional<Tensor>& weight_, bool bias, double eps, double offset) {
  const NormShape shape(x_);
  const DType weight_dtype = dtype_or_float(weight_);
  check_like("grad", grad_, x_);
  check_like("grad_summed", grad_summed_, x_);
  check_vector("weight", weight_, x_, weight_dtype);
  STD_TORCH_CHECK(weight_ || !bias, "a bias comes with a weight");
  const OnDevice device(x_);
  const Tensor grad = dense(grad_), x = dense(x_);
  const auto grad_summed = dense(grad_summed_), weight = dense(weight_);
  const int64_t runs = runs_of(shape.rows, shape.cols);
  const auto partial = [&](bool wanted) {
    return device.empty({wanted ? runs : 0, shape.cols}, ScalarType::Float);
  };
  Tensor dx = device.empty_like(x);
  Tensor dw_runs = partial(weight.has_value()), db_runs = partial(bias);
  const NormBackward args{grad.const_data_ptr(),
                          data_or_null(grad_summed),
                          x.const_data_ptr(),
                          data_or_null(weight),
                          dx.mutable_data_ptr(),
                          weight ? static_cast<float*>(dw_runs.mutable_data_ptr()) : nullptr,
                          shape.rows,
                          shape.cols,
                          runs,
                          static_cast<float>(eps),
                          static_cast<float>(offset),
                          dtype_of(x),
                          weight_dtype,
                          bias ? static_cast<float*>(db_runs.mutable_data_ptr()) : nullptr};
  Tensor dweight = weight ? device.empty_like(*weight) : dw_runs;
  Tensor dbias = bias ? device.empty_like(*weight) : db_runs;
  check(launch(args, weight ? dweight.mutable_data_ptr() : nullptr,
               bias ? dbias.mutable_data_ptr() : nullptr, device.stream()),
        op);
  return {dx, dweight, dbias};
}

}  // namespace fastlm::cuda
