// Binding of activation: sees tensors as rows, allocates, splits over threads, registers.
#include "ops/activation.h"

#include <tuple>

#include "cpu/isa.h"
#include "torch/activation_rows.h"

FASTLM_KERNEL_TABLE(ActivationKernels, activation)

namespace fastlm {
namespace {

// Cuts the work: rows where there are several, else columns at multiples of a cache line, so that
// no two threads write the same one.
template <class Args, class Kernel>
void split(const Args& args, Kernel kernel, int64_t bytes) {
  if (args.rows == 1) {
    constexpr int64_t kLine = 64;
    parallel_rows((args.cols + kLine - 1) / kLine, kLine * bytes, [&](int64_t b, int64_t e) {
      kernel(args, 0, 1, b * kLine, std::min(e * kLine, args.cols));
    });
  } else {
    parallel_rows(args.rows, args.cols * bytes,
                  [&](int64_t b, int64_t e) { kernel(args, b, e, 0, args.cols); });
  }
}

void run_forward(const RowView& x, const void* up, int64_t up_stride, const Tensor& y, bool gaps,
                 int64_t kind) {
  const RowShape shape(y, last_size(y), gaps);
  const ActivationForward args{x.tensor.const_data_ptr(),
                               up,
                               y.mutable_data_ptr(),
                               shape.rows,
                               shape.cols,
                               x.stride,
                               up_stride,
                               static_cast<Activation>(kind),
                               dtype_of(y)};
  split(args, activation_kernels().forward, 12);
}

Tensor activation(const Tensor& x, int64_t kind) {
  Tensor y = empty_cpu_like(x);
  run_forward({dense(x), 0}, nullptr, 0, y, false, kind);
  return y;
}

Tensor gated_activation(const Tensor& gate_, const Tensor& up_, int64_t kind) {
  STD_TORCH_CHECK(
      up_.is_cpu() && up_.scalar_type() == gate_.scalar_type() && same_sizes(gate_, up_),
      "up does not fit gate");
  const RowView gate = row_view(gate_), up = row_view(up_);
  const int64_t cols = last_size(gate_);
  Tensor y = empty_cpu_like(gate_);
  run_forward(gate, up.tensor.const_data_ptr(), up.stride, y,
              gate.stride != cols || up.stride != cols, kind);
  return y;
}

// x [..., 2F]: gate and up side by side.
Tensor packed_activation(const Tensor& x_, int64_t kind) {
  const Tensor x = dense(x_);
  const int64_t cols = last_size(x) / 2, rows = cols == 0 ? 0 : x.numel() / (2 * cols);
  Tensor y = empty_cpu({rows, cols}, x.scalar_type());
  run_forward({x, 2 * cols}, data_at(x, cols), 2 * cols, y, true, kind);
  return y;
}

void run_backward(const ActivationBackward& args) {
  split(args, activation_kernels().backward, 20);
}

Tensor activation_backward(const Tensor& grad_, const Tensor& x_, int64_t kind) {
  const Tensor grad = dense(grad_), x = dense(x_);
  Tensor dx = empty_cpu_like(x);
  const int64_t count = x.numel();
  run_backward({grad.const_data_ptr(), x.const_data_ptr(), nullptr, dx.mutable_data_ptr(), nullptr,
                1, count, count, 0, count, 0, static_cast<Activation>(kind), dtype_of(x)});
  return dx;
}

std::tuple<Tensor, Tensor> gated_activation_backward(const Tensor& grad_, const Tensor& gate_,
                                                     const Tensor& up_, int64_t kind) {
  const Tensor grad = dense(grad_);
  const RowView gate = row_view(gate_), up = row_view(up_);
  Tensor dgate = empty_cpu_like(gate_), dup = empty_cpu_like(up_);
  const int64_t cols = last_size(gate_);
  const RowShape shape(dgate, cols, gate.stride != cols || up.stride != cols);
  run_backward({grad.const_data_ptr(), gate.tensor.const_data_ptr(), up.tensor.const_data_ptr(),
                dgate.mutable_data_ptr(), dup.mutable_data_ptr(), shape.rows, shape.cols,
                gate.stride, up.stride, shape.cols, shape.cols, static_cast<Activation>(kind),
                dtype_of(grad)});
  return {dgate, dup};
}

Tensor packed_activation_backward(const Tensor& grad_, const Tensor& x_, int64_t kind) {
  const Tensor grad = dense(grad_), x = dense(x_);
  Tensor dx = empty_cpu_like(x);
  const int64_t cols = last_size(x) / 2, rows = cols == 0 ? 0 : x.numel() / (2 * cols);
  run_backward({grad.const_data_ptr(), x.const_data_ptr(), data_at(x, cols), dx.mutable_data_ptr(),
                const_cast<void*>(data_at(dx, cols)), rows, cols, 2 * cols, 2 * cols, 2 * cols,
                2 * cols, static_cast<Activation>(kind), dtype_of(x)});
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, m) {
  m.impl("activation", TORCH_BOX(&activation));
  m.impl("gated_activation", TORCH_BOX(&gated_activation));
  m.impl("packed_activation", TORCH_BOX(&packed_activation));
  m.impl("activation_backward", TORCH_BOX(&activation_backward));
  m.impl("gated_activation_backward", TORCH_BOX(&gated_activation_backward));
  m.impl("packed_activation_backward", TORCH_BOX(&packed_activation_backward));
}

}  // namespace fastlm
