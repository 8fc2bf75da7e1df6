// Binding of quantized_linear's CUDA kernel: checks the weight's layout, allocates, registers.
#include "ops/quantized_linear.h"

#include "torch/rows.h"
#include "torch/cuda/device.h"

namespace fastlm {
namespace {

// Whether 16-byte loads can start there; a view at an odd offset is copied.
bool is_aligned(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
}

Tensor quantized_linear(const Tensor& x_, const Tensor& values_, const Tensor& scale_,
                        const std::optional<Tensor>& minimum_, const std::optional<Tensor>& bias_,
                        int64_t out, bool int8) {
  const bool bytes = values_.scalar_type() == ScalarType::Char;
  STD_TORCH_CHECK(!int8, "quantized_linear: the CUDA kernel does not round activations to int8");
  STD_TORCH_CHECK(cuda::same_place(values_, x_) && values_.dim() == 2 && values_.size(0) == out &&
                      (bytes || values_.scalar_type() == ScalarType::Byte),
                  "quantized_linear: values must lie by rows on the device of x: [N, bytes]");
  const int64_t in = values_.size(1) * (bytes ? 1 : 2);
  const auto fits = [&](const Tensor& t) {
    return cuda::same_place(t, x_) && t.dim() == 2 && t.size(0) == out &&
           t.size(1) == scale_.size(1) && t.scalar_type() == ScalarType::Half;
  };
  STD_TORCH_CHECK(scale_.dim() == 2 && fits(scale_) && (!minimum_ || (!bytes && fits(*minimum_))),
                  "quantized_linear: scale and minimum must be fp16 [N, groups] like values");
  STD_TORCH_CHECK(x_.dim() >= 1 && x_.size(-1) == in,
                  "quantized_linear: x must be [..., K] for a weight [N, K]");
  STD_TORCH_CHECK(!bias_ || (cuda::same_place(*bias_, x_) && bias_->dim() == 1 &&
                             bias_->size(0) == out && bias_->scalar_type() == x_.scalar_type()),
                  "quantized_linear: bias must be [N] and like x");
  const int64_t groups = scale_.size(1), group = groups == 0 ? 32 : in / groups;
  STD_TORCH_CHECK(groups * group == in && group >= 32 && (group & (group - 1)) == 0,
                  "quantized_linear: groups must be a power of two from 32 on");
  const cuda::OnDevice device(x_);
  RowView x = row_view(x_);
  if (x.stride % 8 != 0 || !is_aligned(x.tensor)) {
    x = {torch::stable::clone(torch::stable::contiguous(x_)), in};
  }
  Tensor values = dense(values_);
  if (!is_aligned(values)) values = torch::stable::clone(values);
  const Tensor scale = dense(scale_);
  const auto minimum = dense(minimum_), bias = dense(bias_);
  Tensor y = empty_rows(x_, out, device.type(), device.index());
  const int64_t rows = out == 0 ? 0 : y.numel() / out;
  STD_TORCH_CHECK(rows <= cuda::kQuantizedMostRows,
                  "quantized_linear: the CUDA kernel takes at most ", cuda::kQuantizedMostRows,
                  " rows");
  const QuantizedRows args{x.tensor.const_data_ptr(),
                           values.const_data_ptr(),
                           scale.const_data_ptr(),
                           data_or_null(minimum),
                           data_or_null(bias),
                           y.mutable_data_ptr(),
                           rows,
                           in,
                           out,
                           group,
                           x.stride,
                           bytes      ? QuantizedForm::kInt8
                           : minimum_ ? QuantizedForm::kInt4Minimum
                                      : QuantizedForm::kInt4,
                           dtype_of(x_)};
  cuda::check(cuda::quantized_linear(args, device.stream()), "quantized_linear");
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlm, CUDA, m) {
  m.impl("quantized_linear", TORCH_BOX(&quantized_linear));
}

}  // namespace fastlm
