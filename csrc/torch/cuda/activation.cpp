// Binding of activation's CUDA kernels: sees tensors as rows, allocates, registers.
#include "ops/activation.h"

#include <tuple>

#include "torch/activation_rows.h"
#include "torch/cuda/device.h"

namespace fastlm {
namespace {

void check_fits(const char* name, const Tensor& t, const Tensor& like) {
  STD_TORCH_CHECK(
      cuda::same_place(t, like) && t.scalar_type() == like.scalar_type() && same_sizes(t, like),
      name, " does not fit gate");
}

Tensor forward(const cuda::OnDevice& device, const RowView& x, const void* up, int64_t up_stride,
               const Tensor& y, const RowShape& shape, int64_t kind) {
  const ActivationForward args{x.tensor.const_data_ptr(),
                               up,
                               const_cast<void*>(y.const_data_ptr()),
                               shape.rows,
                               shape.cols,
                               x.stride,
                               up_stride,
                               static_cast<Activation>(kind),
                               dtype_of(y)};
  cuda::check(cuda::activation_forward(args, device.stream()), "activation");
  return y;
}

Tensor activation(const Tensor& x, int64_t kind) {
  const cuda::OnDevice device(x);
  const Tensor y = device.empty_like(x);
  return forward(device, {dense(x), 0}, nullptr, 0, y, RowShape(y, last_size(y), false), kind);
}

Tensor gated_activation(const Tensor& gate_, const Tensor& up_, int64_t kind) {
  check_fits("up", up_, gate_);
  const cuda::OnDevice device(gate_);
  const RowView gate = row_view(gate_), up = row_view(up_);
  const int64_t cols = last_size(gate_);
  const Tensor y = device.empty_like(gate_);
  const RowShape shape(y, cols, gate.stride != cols || up.stride != cols);
  return forward(device, gate, up.tensor.const_data_ptr(), up.stride, y, shape, kind);
}

// x [..., 2F]: gate and up side by side.
Tensor packed_activation(const Tensor& x_, int64_t kind) {
  const cuda::OnDevice device(x_);
  const Tensor x = dense(x_);
  const int64_t cols = last_size(x) / 2, rows = cols == 0 ? 0 : x.numel() / (2 * cols);
  const Tensor y = device.empty({rows, cols}, x.scalar_type());
  return forward(device, {x, 2 * cols}, data_at(x, cols), 2 * cols, y, RowShape(y, cols, true),
                 kind);
}

void backward(const cuda::OnDevice& device, const ActivationBackward& args) {
  cuda::check(cuda::activation_backward(args, device.stream()), "activation_backward");
}

Tensor activation_backward(const Tensor& grad_, const Tensor& x_, int64_t kind) {
  check_fits("grad", grad_, x_);
  const cuda::OnDevice device(x_);
  const Tensor grad = dense(grad_), x = dense(x_);
  Tensor dx = device.empty_like(x);
  const int64_t count = x.numel();
  backward(device,
           {grad.const_data_ptr(), x.const_data_ptr(), nullptr, dx.mutable_data_ptr(), nullptr, 1,
            count, count, 0, count, 0, static_cast<Activation>(kind), dtype_of(x)});
  return dx;
}

std::tuple<Tensor, Tensor> gated_activation_backward(const Tensor& grad_, const Tensor& gate_,
                                                     const Tensor& up_, int64_t kind) {
  check_fits("up", up_, gate_);
  check_fits("grad", grad_, gate_);
  const cuda::OnDevice device(gate_);
  const Tensor grad = dense(grad_);
  const RowView gate = row_view(gate_), up = row_view(up_);
  Tensor dgate = device.empty_like(gate_), dup = device.empty_like(up_);
  const int64_t cols = last_size(gate_);
  const RowShape shape(dgate, cols, gate.stride != cols || up.stride != cols);
  backward(device,
           {grad.const_data_ptr(), gate.tensor.const_data_ptr(), up.tensor.const_data_ptr(),
            dgate.mutable_data_ptr(), dup.mutable_data_ptr(), shape.rows, shape.cols, gate.stride,
            up.stride, shape.cols, shape.cols, static_cast<Activation>(kind), dtype_of(grad)});
  return {dgate, dup};
}

Tensor packed_activation_backward(const Tensor& grad_, const Tensor& x_, int64_t kind) {
  STD_TORCH_CHECK(cuda::same_place(grad_, x_) && grad_.scalar_type() == x_.scalar_type() &&
                      2 * grad_.numel() == x_.numel(),
                  "grad does not fit x");
  const cuda::OnDevice device(x_);
  const Tensor grad = dense(grad_), x = dense(x_);
  Tensor dx = device.empty_like(x);
  const int64_t cols = last_size(x) / 2, rows = cols == 0 ? 0 : x.numel() / (2 * cols);
  backward(device,
           {grad.const_data_ptr(), x.const_data_ptr(), data_at(x, cols), dx.mutable_data_ptr(),
            const_cast<void*>(data_at(dx, cols)), rows, cols, 2 * cols, 2 * cols, 2 * cols,
            2 * cols, static_cast<Activation>(kind), dtype_of(x)});
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlm, CUDA, m) {
  m.impl("activation", TORCH_BOX(&activation));
  m.impl("gated_activation", TORCH_BOX(&gated_activation));
  m.impl("packed_activation", TORCH_BOX(&packed_activation));
  m.impl("activation_backward", TORCH_BOX(&activation_backward));
  m.impl("gated_activation_backward", TORCH_BOX(&gated_activation_backward));
  m.impl("packed_activation_backward", TORCH_BOX(&packed_activation_backward));
}

}  // namespace fastlm
