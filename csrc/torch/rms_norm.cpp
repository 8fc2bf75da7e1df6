// Binding of rms_norm: allocates, splits rows over threads, registers the CPU kernels.
#include "ops/rms_norm.h"

#include <tuple>

#include "torch/alloc.h"
#include "cpu/isa.h"

FASTLM_KERNEL_TABLE(RmsNormKernels, rms_norm)

namespace fastlm {
namespace {

// Partial weight gradients: few enough to sum cheaply, enough to keep every core busy.
int64_t num_blocks(int64_t rows) { return std::clamp<int64_t>(rows / 16, 1, 32); }

void forward(const Tensor& x, const std::optional<Tensor>& residual,
             const std::optional<Tensor>& weight, double eps, double offset, const Tensor& y,
             Tensor* summed) {
  const int64_t cols = x.size(-1);
  const int64_t rows = cols == 0 ? 0 : x.numel() / cols;
  const RmsNormForward args{x.const_data_ptr(),
                            data_or_null(residual),
                            data_or_null(weight),
                            y.mutable_data_ptr(),
                            summed == nullptr ? nullptr : summed->mutable_data_ptr(),
                            rows,
                            cols,
                            static_cast<float>(eps),
                            static_cast<float>(offset),
                            dtype_of(x),
                            dtype_or_float(weight)};
  const auto kernel = rms_norm_kernels().forward;
  parallel_rows(rows, cols * 8, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

Tensor rms_norm(const Tensor& x_, const std::optional<Tensor>& weight_, double eps, double offset) {
  const Tensor x = dense(x_);
  Tensor y = empty_cpu_like(x);
  forward(x, std::nullopt, dense(weight_), eps, offset, y, nullptr);
  return y;
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x_, const Tensor& residual_,
                                        const std::optional<Tensor>& weight_, double eps,
                                        double offset) {
  const Tensor x = dense(x_);
  Tensor y = empty_cpu_like(x), summed = empty_cpu_like(x);
  forward(x, dense(residual_), dense(weight_), eps, offset, y, &summed);
  return {y, summed};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad_,
                                             const std::optional<Tensor>& grad_summed_,
                                             const Tensor& x_, const std::optional<Tensor>& weight_,
                                             double eps, double offset) {
  const Tensor grad = dense(grad_), x = dense(x_);
  const auto grad_summed = dense(grad_summed_), weight = dense(weight_);
  const int64_t cols = x.size(-1);
  const int64_t rows = cols == 0 ? 0 : x.numel() / cols;
  const int64_t blocks = num_blocks(rows);
  Tensor dx = empty_cpu_like(x);
  Tensor partial = empty_cpu({weight ? blocks : 0, cols}, ScalarType::Float);
  const RmsNormBackward args{grad.const_data_ptr(),
                             data_or_null(grad_summed),
                             x.const_data_ptr(),
                             data_or_null(weight),
                             dx.mutable_data_ptr(),
                             weight ? static_cast<float*>(partial.mutable_data_ptr()) : nullptr,
                             rows,
                             cols,
                             blocks,
                             static_cast<float>(eps),
                             static_cast<float>(offset),
                             dtype_of(x),
                             dtype_or_float(weight)};
  const auto kernel = rms_norm_kernels().backward;
  parallel_rows(blocks, rows / blocks * cols * 12,
                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return {dx, weight ? sum_blocks(partial, weight->scalar_type()) : partial};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}

}  // namespace fastlm
