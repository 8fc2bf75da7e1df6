// Binding of quantized_linear: checks and allocates, quantizes x, splits the outputs over threads.
#include "ops/quantized_linear.h"

#include "torch/product.h"
#include "cpu/isa.h"

FASTLM_KERNEL_TABLE(QuantizedLinearKernels, quantized_linear)

namespace fastlm {
namespace {

constexpr int64_t kStack = 16384;  // bytes of quantized x that are not worth an allocation

struct Weight {
  QuantizedForm form;
  int64_t panels, in, group;
};

// The checks that keep the kernel from reading the wrong memory.
Weight check_weight(const Tensor& values, const Tensor& scale, const std::optional<Tensor>& minimum,
                    int64_t in, int64_t out) {
  const bool bytes = values.scalar_type() == ScalarType::Char;
  STD_TORCH_CHECK(values.dim() == 4 && values.is_contiguous() && values.is_cpu() &&
                      (bytes || values.scalar_type() == ScalarType::Byte) && values.size(2) == 16 &&
                      values.size(3) == 4,
                  "values must be packed on the CPU: [panels, quads, 16, 4]");
  const auto alike = [&](const Tensor& t) {
    return t.dim() == 3 && t.is_contiguous() && t.is_cpu() && t.size(0) == values.size(0) &&
           t.size(2) == 16 && t.scalar_type() == ScalarType::Half;
  };
  STD_TORCH_CHECK(alike(scale) && (!minimum || (alike(*minimum) && !bytes &&
                                                minimum->size(1) == scale.size(1))),
                  "scale and minimum must be packed like values: fp16 [panels, groups, 16]");
  const int64_t groups = scale.size(1), group = groups == 0 ? kQuantizedBlock : in / groups;
  STD_TORCH_CHECK(values.size(1) * (bytes ? 4 : 8) == in && groups * group == in &&
                      group % kQuantizedBlock == 0,
                  "x must be [..., K] for packed values [panels, K / 4 or 8, 16, 4], its groups",
                  " whole multiples of 32");
  STD_TORCH_CHECK((out + kQuantizedPanel - 1) / kQuantizedPanel == values.size(0),
                  "out must be what the panels hold");
  return {bytes     ? QuantizedForm::kInt8
          : minimum ? QuantizedForm::kInt4Minimum
                    : QuantizedForm::kInt4,
          values.size(0), in, group};
}

Tensor quantized_linear(const Tensor& x_, const Tensor& values, const Tensor& scale,
                        const std::optional<Tensor>& minimum, const std::optional<Tensor>& bias_,
                        int64_t out, bool bytes) {
  STD_TORCH_CHECK(x_.dim() >= 1 && x_.is_cpu(), "x must be [..., K] on the CPU");
  const int64_t in = x_.size(-1);
  const Weight w = check_weight(values, scale, minimum, in, out);
  STD_TORCH_CHECK(!bias_ || (bias_->dim() == 1 && bias_->size(0) == out && bias_->is_cpu() &&
                             bias_->scalar_type() == x_.scalar_type()),
                  "bias must be [N] and like x");
  const Tensor x = dense(x_);
  const std::optional<Tensor> bias = dense(bias_);
  Tensor y = empty_cpu_rows(x, out);
  const DType dtype = dtype_of(x);
  const int digits = bytes ? 1 : dtype == DType::kFloat32 ? 4 : 3;
  const int64_t rows = out == 0 ? 0 : y.numel() / out;
  const int64_t row_bytes = quantized_row_bytes(in, digits);

  alignas(64) char stack[kStack];
  void* q = stack;
  std::optional<Tensor> scratch;
  if (rows * row_bytes > kStack) {
    scratch = empty_cpu({rows * row_bytes}, ScalarType::Byte);
    q = scratch->mutable_data_ptr();
  }
  const QuantizedLinearKernels& kernels = quantized_linear_kernels();
  const QuantizeRows quantize{x.const_data_ptr(), q, in, in, digits, w.form, dtype};
  parallel_rows(rows, row_bytes * 4,
                [&](int64_t begin, int64_t end) { kernels.quantize(quantize, begin, end); });
  const QuantizedLinearForward args{q,
                                    values.const_data_ptr(),
                                    scale.const_data_ptr(),
                                    data_or_null(minimum),
                                    data_or_null(bias),
                                    y.mutable_data_ptr(),
                                    rows,
                                    in,
                                    out,
                                    w.group,
                                    out,
                                    digits,
                                    w.form,
                                    dtype};
  const int64_t panel_bytes = kQuantizedPanel * in / (w.form == QuantizedForm::kInt8 ? 1 : 2);
  parallel_rows(rows == 0 ? 0 : w.panels, panel_bytes * (1 + rows / 2),
                [&](int64_t begin, int64_t end) { kernels.forward(args, begin, end); });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, m) {
  m.impl("quantized_linear", TORCH_BOX(&quantized_linear));
}

}  // namespace fastlm
