// What the bindings of rms_norm and layer_norm share: shapes, allocation, splitting into tasks.
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
inline void check_like(const char* name, const Tensor& t, const Tensor& x) {
  bool same = t.is_cpu() && t.scalar_type() == x.scalar_type() && t.dim() == x.dim();
  for (int64_t d = 0; same && d < x.dim(); ++d) same = t.size(d) == x.size(d);
  STD_TORCH_CHECK(same, name, " does not fit x");
}
inline void check_vector(const char* name, const std::optional<Tensor>& t, int64_t cols,
                         DType dtype) {
  if (!t) return;
  STD_TORCH_CHECK(t->is_cpu() && t->dim() == 1 && t->size(0) == cols && dtype_of(*t) == dtype, name,
                  " does not fit x");
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
  const DType weight_dtype = dtype_or_float(weight ? weight : bias);
  check_vector("weight", weight, shape.cols, weight_dtype);
  check_vector("bias", bias, shape.cols, weight_dtype);
  const NormForward args{x.const_data_ptr(),
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
                         data_or_null(bias),
                         past_cache(y, shape)};
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
  check_like("grad", grad_, x_);
  if (grad_summed_) check_like("grad_summed", *grad_summed_, x_);
  const Tensor grad = dense(grad_), x = dense(x_);
  const auto grad_summed = dense(grad_summed_), weight = dense(weight_);
  const Rows shape(x);
  const DType weight_dtype = dtype_or_float(weight);
  check_vector("weight", weight, shape.cols, weight_dtype);
  STD_TORCH_CHECK(weight || !bias, "a bias comes with a weight");
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
  const NormBackward args{grad.const_data_ptr(),
                          data_or_null(grad_summed),
                          x.const_data_ptr(),
                          data_or_null(weight),
                          dx.mutable_data_ptr(),
                          weight ? static_cast<float*>(dweight.mutable_data_ptr()) : nullptr,
                          shape.rows,
                          shape.cols,
                          blocks,
                          static_cast<float>(eps),
                          static_cast<float>(offset),
                          dtype_of(x),
                          weight_dtype,
                          bias ? static_cast<float*>(dbias.mutable_data_ptr()) : nullptr,
                          past_cache(dx, shape)};
  parallel_rows(blocks, shape.rows / blocks * shape.cols * 12,
                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return {dx, total(weight.has_value(), dweight), total(bias, dbias)};
}

}  // namespace fastlm
