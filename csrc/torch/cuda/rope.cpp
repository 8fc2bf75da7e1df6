// Binding of rope's CUDA kernel: allocates, launches q and k at once, registers.
#include "torch/rope.h"

#include <tuple>

#include "torch/cuda/device.h"

namespace fastlm {
namespace {

void check_place(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  STD_TORCH_CHECK(cuda::same_place(cos, x) && cuda::same_place(sin, x),
                  "rope: the tables lie on another device");
}

Tensor rope_single(const Tensor& x_, const Tensor& cos_, const Tensor& sin_, int64_t rotary,
                   bool interleaved, bool transposed) {
  check_place(x_, cos_, sin_);
  const cuda::OnDevice device(x_);
  const Tensor x = unit_stride(x_), cos = unit_stride(cos_), sin = unit_stride(sin_);
  const Tensor y = empty_in_order(x_, device.type(), device.index());
  const RopeArgs args = rope_arguments(x, y, cos, sin, rotary, interleaved, transposed);
  cuda::check(cuda::rope(&args, 1, device.stream()), "rope");
  return y;
}

std::tuple<Tensor, Tensor> rope(const Tensor& q_, const Tensor& k_, const Tensor& cos_,
                                const Tensor& sin_, int64_t rotary, bool interleaved,
                                bool transposed) {
  STD_TORCH_CHECK(q_.dim() == 4 && k_.dim() == 4 && q_.size(0) == k_.size(0) &&
                      q_.size(2) == k_.size(2) && q_.size(3) == k_.size(3) &&
                      q_.scalar_type() == k_.scalar_type() && cuda::same_place(k_, q_),
                  "rope: q and k do not fit each other");
  check_place(q_, cos_, sin_);
  const cuda::OnDevice device(q_);
  const Tensor q = unit_stride(q_), k = unit_stride(k_);
  const Tensor cos = unit_stride(cos_), sin = unit_stride(sin_);
  const Tensor y = empty_in_order(q_, device.type(), device.index());
  const Tensor z = empty_in_order(k_, device.type(), device.index());
  const RopeArgs args[] = {rope_arguments(q, y, cos, sin, rotary, interleaved, transposed),
                           rope_arguments(k, z, cos, sin, rotary, interleaved, transposed)};
  cuda::check(cuda::rope(args, 2, device.stream()), "rope");
  return {y, z};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlm, CUDA, m) {
  m.impl("rope", TORCH_BOX(&rope));
  m.impl("rope_single", TORCH_BOX(&rope_single));
}

}  // namespace fastlm
