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
  check_two(q_, k_);
  STD_TORCH_CHECK(cuda::same_place(k_, q_), "rope: q and k do not fit each other");
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

void rope_single_in_place(const Tensor& x, const Tensor& cos_, const Tensor& sin_, int64_t rotary,
                          bool interleaved) {
  check_own_elements(x);
  check_place(x, cos_, sin_);
  const cuda::OnDevice device(x);
  const Tensor cos = unit_stride(cos_), sin = unit_stride(sin_);
  const RopeArgs args = rope_arguments(x, x, cos, sin, rotary, interleaved, false);
  cuda::check(cuda::rope(&args, 1, device.stream()), "rope_");
}

void rope_in_place(const Tensor& q, const Tensor& k, const Tensor& cos_, const Tensor& sin_,
                   int64_t rotary, bool interleaved) {
  check_own_elements(q, k);
  STD_TORCH_CHECK(cuda::same_place(k, q), "rope: q and k do not fit each other");
  check_place(q, cos_, sin_);
  const cuda::OnDevice device(q);
  const Tensor cos = unit_stride(cos_), sin = unit_stride(sin_);
  const RopeArgs args[] = {rope_arguments(q, q, cos, sin, rotary, interleaved, false),
                           rope_arguments(k, k, cos, sin, rotary, interleaved, false)};
  cuda::check(cuda::rope(args, 2, device.stream()), "rope_");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlm, CUDA, m) {
  m.impl("rope", TORCH_BOX(&rope));
  m.impl("rope_single", TORCH_BOX(&rope_single));
  m.impl("rope_", TORCH_BOX(&rope_in_place));
  m.impl("rope_single_", TORCH_BOX(&rope_single_in_place));
}

}  // namespace fastlm
