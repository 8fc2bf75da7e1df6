// activation's operators for any device: checks, allocation, contracts. A Place is made from the
// tensor whose device runs them; it allocates there (`empty_like`, `empty`) and runs a contract
// (`run`).
#pragma once
#include "ops/activation.h"

#include <tuple>

#include "torch/rows.h"

namespace fastlm {

inline void check_together(const char* name, const Tensor& t, const Tensor& like) {
  const bool here =
      like.is_cpu() ? t.is_cpu() : t.is_cuda() && t.get_device_index() == like.get_device_index();
  STD_TORCH_CHECK(here && t.scalar_type() == like.scalar_type(), "activation: ", name,
                  " must be on the device of the others, and of their type");
}
inline void check_fits(const char* name, const Tensor& t, const Tensor& like) {
  check_together(name, t, like);
  STD_TORCH_CHECK(same_sizes(t, like), "activation: ", name, " must be of the others' shape");
}

template <class Place>
void run_activation(const Place& place, const RowView& x, const void* up, int64_t up_stride,
                    const Tensor& y, const RowShape& shape, int64_t kind) {
  place.run(ActivationForward{x.tensor.const_data_ptr(), up, y.mutable_data_ptr(), shape.rows,
                              shape.cols, x.stride, up_stride, static_cast<Activation>(kind),
                              dtype_of(y)});
}

template <class Place>
Tensor activation(const Tensor& x, int64_t kind) {
  const Place place(x);
  Tensor y = place.empty_like(x);
  run_activation(place, {dense(x), 0}, nullptr, 0, y, RowShape(y, last_size(y), false), kind);
  return y;
}

template <class Place>
Tensor gated_activation(const Tensor& gate_, const Tensor& up_, int64_t kind) {
  check_fits("up", up_, gate_);
  const Place place(gate_);
  const RowView gate = row_view(gate_), up = row_view(up_);
  const int64_t cols = last_size(gate_);
  Tensor y = place.empty_like(gate_);
  const RowShape shape(y, cols, gate.stride != cols || up.stride != cols);
  run_activation(place, gate, up.tensor.const_data_ptr(), up.stride, y, shape, kind);
  return y;
}

// The rows of x [..., 2F], gate and up side by side.
inline RowShape halves(const Tensor& x) {
  const int64_t cols = last_size(x) / 2;
  RowShape shape(x, cols, true);
  shape.rows = cols == 0 ? 0 : x.numel() / (2 * cols);
  return shape;
}

template <class Place>
Tensor packed_activation(const Tensor& x_, int64_t kind) {
  const Place place(x_);
  const Tensor x = dense(x_);
  const RowShape shape = halves(x);
  Tensor y = place.empty({shape.rows, shape.cols}, x.scalar_type());
  run_activation(place, {x, 2 * shape.cols}, data_at(x, shape.cols), 2 * shape.cols, y, shape,
                 kind);
  return y;
}

template <class Place>
Tensor activation_backward(const Tensor& grad_, const Tensor& x_, int64_t kind) {
  check_fits("grad", grad_, x_);
  const Place place(x_);
  const Tensor grad = dense(grad_), x = dense(x_);
  Tensor dx = place.empty_like(x);
  const int64_t count = x.numel();
  place.run(ActivationBackward{grad.const_data_ptr(), x.const_data_ptr(), nullptr,
                               dx.mutable_data_ptr(), nullptr, 1, count, count, 0, count, 0,
                               static_cast<Activation>(kind), dtype_of(x)});
  return dx;
}

template <class Place>
std::tuple<Tensor, Tensor> gated_activation_backward(const Tensor& grad_, const Tensor& gate_,
                                                     const Tensor& up_, int64_t kind) {
  check_fits("up", up_, gate_);
  check_fits("grad", grad_, gate_);
  const Place place(gate_);
  const Tensor grad = dense(grad_);
  const RowView gate = row_view(gate_), up = row_view(up_);
  Tensor dgate = place.empty_like(gate_), dup = place.empty_like(up_);
  const int64_t cols = last_size(gate_);
  const RowShape shape(dgate, cols, gate.stride != cols || up.stride != cols);
  place.run(ActivationBackward{
      grad.const_data_ptr(), gate.tensor.const_data_ptr(), up.tensor.const_data_ptr(),
      dgate.mutable_data_ptr(), dup.mutable_data_ptr(), shape.rows, shape.cols, gate.stride,
      up.stride, shape.cols, shape.cols, static_cast<Activation>(kind), dtype_of(grad)});
  return {dgate, dup};
}

template <class Place>
Tensor packed_activation_backward(const Tensor& grad_, const Tensor& x_, int64_t kind) {
  check_together("grad", grad_, x_);
  STD_TORCH_CHECK(2 * grad_.numel() == x_.numel(), "activation: grad does not fit x");
  const Place place(x_);
  const Tensor grad = dense(grad_), x = dense(x_);
  Tensor dx = place.empty_like(x);
  const RowShape shape = halves(x);
  const int64_t cols = shape.cols;
  char* dup = static_cast<char*>(dx.mutable_data_ptr()) + cols * dx.element_size();
  place.run(ActivationBackward{grad.const_data_ptr(), x.const_data_ptr(), data_at(x, cols),
                               dx.mutable_data_ptr(), dup, shape.rows, cols, 2 * cols, 2 * cols,
                               2 * cols, 2 * cols, static_cast<Activation>(kind), dtype_of(x)});
  return dx;
}

}  // namespace fastlm
