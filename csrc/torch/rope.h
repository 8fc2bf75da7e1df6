// What the bindings of rope share: the order of memory, the checks, the contract.
#pragma once
#include "ops/rope.h"

#include "torch/alloc.h"

namespace fastlm {

// A fresh tensor of x's shape [B, H, T, D] that lies in memory as x does: tokens within heads, or
// heads within tokens, as the projections of a model leave them.
inline Tensor empty_in_order(const Tensor& x, int32_t device_type, int32_t device_index) {
  const int64_t heads = x.size(1), tokens = x.size(2), size = x.size(3);
  const int64_t sizes[] = {x.size(0), heads, tokens, size};
  if (x.stride(1) >= x.stride(2)) {
    return empty_dense(sizes, 4, x.scalar_type(), device_type, device_index);
  }
  const int64_t strides[] = {std::max<int64_t>(heads * tokens * size, 1),
                             std::max<int64_t>(size, 1), std::max<int64_t>(heads * size, 1), 1};
  return empty_strided(sizes, strides, 4, x.scalar_type(), device_type, device_index);
}
inline Tensor empty_in_order(const Tensor& x) {
  return empty_in_order(x, aoti_torch_device_type_cpu(), 0);
}

// Checks that x may be overwritten: its last dimension is dense and no element stands twice.
inline void check_own_elements(const Tensor& x) {
  bool own = x.dim() > 0 && (x.size(-1) <= 1 || x.stride(-1) == 1);
  for (int64_t d = 0; d < x.dim(); ++d) own = own && (x.size(d) <= 1 || x.stride(d) != 0);
  STD_TORCH_CHECK(own, "rope_: x is expanded, or its last dimension is not dense");
}

// Checks that q and k are two tensors of one form.
inline void check_two(const Tensor& q, const Tensor& k) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && q.size(0) == k.size(0) &&
                      q.size(2) == k.size(2) && q.size(3) == k.size(3) &&
                      q.scalar_type() == k.scalar_type(),
                  "rope: q and k do not fit each other");
}

// Checks that q and k may be overwritten, each by itself.
inline void check_own_elements(const Tensor& q, const Tensor& k) {
  check_two(q, k);
  check_own_elements(q);
  check_own_elements(k);
  STD_TORCH_CHECK(q.numel() == 0 || k.numel() == 0 || q.const_data_ptr() != k.const_data_ptr(),
                  "rope_: k lies where q does");
}

// Checks that the tensors fit, the last dimension of each being dense, and describes them. The
// tiles are left to the caller.
inline RopeArgs rope_arguments(const Tensor& x, const Tensor& y, const Tensor& cos,
                               const Tensor& sin, int64_t rotary, bool interleaved,
                               bool transposed) {
  STD_TORCH_CHECK(x.dim() == 4, "rope: the arguments do not fit each other");
  const int64_t batch = x.size(0), heads = x.size(1), tokens = x.size(2), head_dim = x.size(3);
  const bool per_batch = cos.dim() == 3 && cos.size(0) > 1;
  const int64_t width = cos.size(-1);
  STD_TORCH_CHECK(rotary > 0 && rotary % 2 == 0 && rotary <= std::min(head_dim, kRopeTableFloats) &&
                      (width == rotary || 2 * width == rotary) && cos.size(-2) == tokens &&
                      cos.dim() <= 3 && (!per_batch || cos.size(0) == batch) &&
                      cos.sizes() == sin.sizes() && cos.scalar_type() == sin.scalar_type() &&
                      (cos.scalar_type() == x.scalar_type() || dtype_of(cos) == DType::kFloat32),
                  "rope: the arguments do not fit each other");
  return {x.const_data_ptr(),
          y.mutable_data_ptr(),
          x.stride(0),
          x.stride(1),
          x.stride(2),
          y.stride(0),
          y.stride(1),
          y.stride(2),
          cos.const_data_ptr(),
          sin.const_data_ptr(),
          per_batch ? cos.stride(0) : 0,
          cos.stride(-2),
          per_batch ? sin.stride(0) : 0,
          sin.stride(-2),
          batch,
          heads,
          tokens,
          head_dim,
          rotary,
          0,
          0,
          width == rotary,
          interleaved,
          transposed,
          dtype_of(x),
          dtype_of(cos)};
}

}  // namespace fastlm
