// Binding of quantized_linear: checks and allocates, quantizes x, splits the outputs over threads.
#include "ops/quantized_linear.h"

#include <new>

#include "torch/product.h"
#include "cpu/isa.h"

FASTLM_KERNEL_TABLE(QuantizedLinearKernels, quantized_linear)

namespace fastlm {
namespace {

constexpr int64_t kStack = 16384;        // bytes of quantized x that are not worth an allocation
constexpr int64_t kRowsBytes = 4 << 20;  // of quantized x at a time, so that it stays in the cache

// The weight's pointers and sizes, after the checks that keep a kernel from reading wrong memory.
Dequantize packed_weight(const Tensor& values, const Tensor& scale,
                         const std::optional<Tensor>& minimum, int64_t out, DType dtype) {
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
  const int64_t in = values.size(1) * (bytes ? 4 : 8);
  const int64_t groups = scale.size(1), group = groups == 0 ? kQuantizedBlock : in / groups;
  STD_TORCH_CHECK(groups * group == in && group % kQuantizedBlock == 0,
                  "groups must be whole multiples of 32 values");
  STD_TORCH_CHECK((out + kQuantizedPanel - 1) / kQuantizedPanel == values.size(0),
                  "out must be what the panels hold");
  const QuantizedForm form = bytes     ? QuantizedForm::kInt8
                             : minimum ? QuantizedForm::kInt4Minimum
                                       : QuantizedForm::kInt4;
  return {values.const_data_ptr(),
          scale.const_data_ptr(),
          data_or_null(minimum),
          nullptr,
          in,
          out,
          group,
          0,
          form,
          dtype};
}

int64_t panel_bytes(const Dequantize& w) {
  return kQuantizedPanel * w.in / (w.form == QuantizedForm::kInt8 ? 1 : 2);
}

// x in fixed point, some rows at a time, against the packed integers.
void run_digits(const QuantizedLinearKernels& kernels, const QuantizedProduct& a, int digits) {
  const Dequantize& w = a.weight;
  const int64_t row_bytes = quantized_row_bytes(w.in, digits);
  const int64_t most = std::max<int64_t>(kRowsBytes / std::max<int64_t>(row_bytes, 1), 16);
  const int64_t count = std::min(a.rows, most);
  alignas(64) char stack[kStack];
  std::optional<Tensor> scratch;
  void* q = stack;
  if (count * row_bytes > kStack) {
    scratch = empty_cpu({count * row_bytes}, ScalarType::Byte);
    q = scratch->mutable_data_ptr();
  }
  const int64_t size = w.dtype == DType::kFloat32 ? 4 : 2;
  for (int64_t row = 0; row < a.rows; row += count) {
    const int64_t rows = std::min(count, a.rows - row);
    const QuantizeRows quantize{
        static_cast<const char*>(a.x) + row * w.in * size, q, w.in, w.in, digits, w.form, w.dtype};
    parallel_rows(rows, row_bytes * 4,
                  [&](int64_t begin, int64_t end) { kernels.quantize(quantize, begin, end); });
    const QuantizedLinearForward forward{
        q,      w.values, w.scale, w.minimum, a.bias, static_cast<char*>(a.y) + row * w.out * size,
        rows,   w.in,     w.out,   w.group,   w.out,  digits,
        w.form, w.dtype};
    const int64_t panels = (w.out + kQuantizedPanel - 1) / kQuantizedPanel;
    parallel_rows(panels, panel_bytes(w) * (1 + rows / 2),
                  [&](int64_t begin, int64_t end) { kernels.forward(forward, begin, end); });
  }
}

// The weight as floats, a block of outputs at a time, against all rows.
void run_floats(const QuantizedLinearKernels& kernels, const QuantizedProduct& a) {
  const Dequantize& w = a.weight;
  const size_t bytes = static_cast<size_t>(kernels.block * w.in) * 4;
  const int64_t blocks = (w.out + kernels.block - 1) / kernels.block;
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    constexpr std::align_val_t kLine{64};
    void* scratch = ::operator new(bytes, kLine);
    kernels.product(a, scratch, begin, end);
    ::operator delete(scratch, kLine);
  });
}

Tensor quantized_linear(const Tensor& x_, const Tensor& values, const Tensor& scale,
                        const std::optional<Tensor>& minimum, const std::optional<Tensor>& bias_,
                        int64_t out, bool int8) {
  STD_TORCH_CHECK(x_.dim() >= 1 && x_.is_cpu(), "x must be [..., K] on the CPU");
  const DType dtype = dtype_of(x_);
  const Dequantize w = packed_weight(values, scale, minimum, out, dtype);
  STD_TORCH_CHECK(x_.size(-1) == w.in, "x must be [..., K] for a weight [N, K]");
  STD_TORCH_CHECK(!bias_ || (bias_->dim() == 1 && bias_->size(0) == out && bias_->is_cpu() &&
                             bias_->scalar_type() == x_.scalar_type()),
                  "bias must be [N] and like x");
  const Tensor x = dense(x_);
  const std::optional<Tensor> bias = dense(bias_);
  Tensor y = empty_cpu_rows(x, out);
  const int64_t rows = out == 0 ? 0 : y.numel() / out;
  if (rows == 0) return y;
  const QuantizedLinearKernels& kernels = quantized_linear_kernels();
  const QuantizedProduct args{x.const_data_ptr(), data_or_null(bias), y.mutable_data_ptr(), rows,
                              w};
  const bool many = rows > kQuantizedFewRows && !int8;
  if (many && (dtype == DType::kBFloat16 || (dtype == DType::kFloat32 && !kernels.fast_bytes))) {
    run_floats(kernels, args);
  } else {
    run_digits(kernels, args, int8 ? 1 : dtype == DType::kFloat32 ? 4 : 3);
  }
  return y;
}

Tensor dequantize(const Tensor& values, const Tensor& scale, const std::optional<Tensor>& minimum,
                  int64_t out, ScalarType type) {
  Dequantize w = packed_weight(values, scale, minimum, out, DType::kFloat32);
  Tensor floats = empty_cpu({out, w.in}, type);
  w.w = floats.mutable_data_ptr();
  w.dtype = dtype_of(floats);
  const QuantizedLinearKernels& kernels = quantized_linear_kernels();
  parallel_rows(values.size(0), panel_bytes(w) * 4,
                [&](int64_t begin, int64_t end) { kernels.dequantize(w, begin, end); });
  return floats;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, m) {
  m.impl("quantized_linear", TORCH_BOX(&quantized_linear));
  m.impl("dequantize", TORCH_BOX(&dequantize));
}

}  // namespace fastlm
