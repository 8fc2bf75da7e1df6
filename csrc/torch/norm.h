// What the bindings of rms_norm and layer_norm share: checks and contracts on any device, then
// allocation and splitting into tasks on a CPU.
#pragma once
#include "ops/norm.h"

#include <tuple>

#include "torch/alloc.h"

namespace fastlm {

// The input seen as rows, all of one length.
struct Rows {
  int64_t rows, cols;
  explicit Rows(const Tensor& x) : cols(x.dim() > 0 ? x.size(-1) : 0) {
    STD_TORCH_CHECK(x.dim() > 0, "x must be of rank 1 or more");
    rows = cols == 0 ? 0 : x.numel() / cols;
  }
};

// Memory safety only: the messages users see come from fastlm/ops/.
inline bool beside(const Tensor& t, const Tensor& x) {
  return x.is_cpu() ? t.is_cpu() : t.is_cuda() && t.get_device_index() == x.get_device_index();
}
inline void check_like(const char* name, const Tensor& t, const Tensor& x) {
  STD_TORCH_CHECK(beside(t, x) && t.scalar_type() == x.scalar_type() && same_sizes(t, x), name,
                  " does not fit x");
}
inline void check_vector(const char* name, const std::optional<Tensor>& t, const Tensor& x,
                         DType dtype) {
  STD_TORCH_CHECK(
      !t || (beside(*t, x) && t->dim() == 1 && t->size(0) == x.size(-1) && dtype_of(*t) == dtype &&
             (dtype == DType::kFloat32 || dtype == dtype_of(x))),
      name, " does not fit x");
}

// The contract of a forward pass. All tensors are contiguous; what weight and bias point to is
// checked here.
inline NormForward forward_arguments(const Tensor& x, const std::optional<Tensor>& residual,
                                     const std::optional<Tensor>& weight,
                                     const std::optional<Tensor>& bias, double eps, double offset,
                                     const Tensor& y, void* summed) {
  const Rows shape(x);
  const DType weight_dtype = dtype_or_float(weight ? weight : bias);
  check_vector("weight", weight, x, weight_dtype);
  check_vector("bias", bias, x, weight_dtype);
  return {x.const_data_ptr(),
          data_or_null(residual),
          data_or_null(weight),
          y.mutable_data_ptr(),
          summed,
          shape.rows,
          shape.cols,
          static_cast<float>(eps),
          static_cast<float>(offset),
          dtype_of(x),
          weight_dtype,
          data_or_null(bias)};
}

// The contract of a backward pass; the caller adds where partial sums go.
inline NormBackward backward_arguments(const Tensor& grad, const std::optional<Tensor>& grad_summed,
                                       const Tensor& x, const std::optional<Tensor>& weight,
                                       const Tensor& dx, int64_t blocks, double eps,
                                       double offset) {
  const Rows shape(x);
  return {grad.const_data_ptr(),
          data_or_null(grad_summed),
          x.const_data_ptr(),
          data_or_null(weight),
          dx.mutable_data_ptr(),
          nullptr,
          shape.rows,
          shape.cols,
          blocks,
          static_cast<float>(eps),
          static_cast<float>(offset),
          dtype_of(x),
          dtype_or_float(weight)};
}

// What is checked of a backward pass's tensors.
inline void check_backward(const Tensor& grad, const std::optional<Tensor>& grad_summed,
                           const Tensor& x, const std::optional<Tensor>& weight, bool bias) {
  check_like("grad", grad, x);
  if (grad_summed) check_like("grad_summed", *grad_summed, x);
  check_vector("weight", weight, x, dtype_or_float(weight));
  STD_TORCH_CHECK(weight || !bias, "a bias comes with a weight");
}

// Whether a result is larger than a core's share of the caches, so that storing past them spares
// fetching its lines first; its rows must be aligned for that kind of store.
inline bool past_cache(const Tensor& y, const Rows& shape) {
  constexpr int64_t kPastCache = 4 << 20;
  const int64_t row_bytes = shape.cols * y.element_size();
  return shape.rows * row_bytes >= kPastCache && row_bytes % 64 == 0 &&
         reinterpret_cast<uintptr_t>(y.const_data_ptr()) % 64 == 0;
}

// y = norm(x), or with `residual` norm(x + residual), the sum being written to `summed`.
inline void run_norm(void (*kernel)(const NormForward&, int64_t, int64_t), const Tensor& x,
                     const std::optional<Tensor>& residual, const std::optional<Tensor>& weight_,
                     const std::optional<Tensor>& bias_, double eps, double offset, const Tensor& y,
                     void* summed) {
  const Rows shape(x);
  const auto weight = dense(weight_), bias = dense(bias_);
  NormForward args = forward_arguments(x, residual, weight, bias, eps, offset, y, summed);
  args.past_cache = past_cache(y, shape);
  parallel_rows(shape.rows, shape.cols * 8,
                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

inline Tensor norm(void (*kernel)(const NormForward&, int64_t, int64_t), const Tensor& x_,
                   const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                   double eps, double offset) {
  const Tensor x = dense(x_);
  Tensor y = empty_cpu_like(x);
  run_norm(kernel, x, std::nullopt, weight, bias, eps, offset, y, nullptr);
  return y;
}

inline std::tuple<Tensor, Tensor> add_norm(void (*kernel)(const NormForward&, int64_t, int64_t),
                                           const Tensor& x_, const Tensor& residual,
                                           const std::optional<Tensor>& weight,
                                           const std::optional<Tensor>& bias, double eps,
                                           double offset) {
  check_like("residual", residual, x_);
  const Tensor x = dense(x_);
  Tensor y = empty_cpu_like(x), summed = empty_cpu_like(x);
  run_norm(kernel, x, dense(residual), weight, bias, eps, offset, y, summed.mutable_data_ptr());
  return {y, summed};
}

// dx, dweight and dbias, the last two empty where there is no weight or bias.
inline std::tuple<Tensor, Tensor, Tensor> norm_backward(
    void (*kernel)(const NormBackward&, int64_t, int64_t), const Tensor& grad_,
    const std::optional<Tensor>& grad_summed_, const Tensor& x_,
    const std::optional<Tensor>& weight_, bool bias, double eps, double offset) {
  check_backward(grad_, grad_summed_, x_, weight_, bias);
  const Tensor grad = dense(grad_), x = dense(x_);
  const auto grad_summed = dense(grad_summed_), weight = dense(weight_);
  const Rows shape(x);
  const DType weight_dtype = dtype_or_float(weight);
  // partial sums: few enough to add up cheaply, enough to keep every core busy and each sum short
  const int64_t blocks = std::max(std::clamp<int64_t>(shape.rows / 16, 1, 32), shape.rows / 128);
  const bool whole = blocks == 1 && weight_dtype == DType::kFloat32;  // the sum is the result
  const auto partial = [&](bool wanted) {
    if (!wanted) return empty_cpu({0, shape.cols}, ScalarType::Float);
    return whole ? empty_cpu({shape.cols}, ScalarType::Float)
                 : empty_cpu({blocks, shape.cols}, ScalarType::Float);
  };
  const auto total = [&](bool wanted, const Tensor& t) {
    return wanted && !whole ? sum_blocks(t, weight->scalar_type()) : t;
  };
  Tensor dx = empty_cpu_like(x);
  const Tensor dweight = partial(weight.has_value()), dbias = partial(bias);
  NormBackward args = backward_arguments(grad, grad_summed, x, weight, dx, blocks, eps, offset);
  if (weight) args.dweight_blocks = static_cast<float*>(dweight.mutable_data_ptr());
  if (bias) args.dbias_blocks = static_cast<float*>(dbias.mutable_data_ptr());
  args.past_cache = past_cache(dx, shape);
  parallel_rows(blocks, shape.rows / blocks * shape.cols * 12,
                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return {dx, total(weight.has_value(), dweight), total(bias, dbias)};
}

}  // namespace fastlm
