// Binding of rope_append's CUDA kernel: allocates, registers. Nothing reads lengths and pages but
// the kernel.
#include "torch/rope_append.h"

#include "torch/cuda/device.h"

namespace fastlm {
namespace {

Tensor rope_append(const Tensor& q_, const Tensor& k_, const Tensor& v_,
                   const std::optional<Tensor>& cos_, const std::optional<Tensor>& sin_,
                   const Tensor& k_cache, const Tensor& v_cache,
                   const std::optional<Tensor>& lengths_, int64_t length,
                   const std::optional<Tensor>& table_, const std::optional<Tensor>& q_weight_,
                   const std::optional<Tensor>& k_weight_, int64_t rotary, bool interleaved,
                   double eps, double offset) {
  for (const Tensor* t : {&k_, &v_, &k_cache, &v_cache}) {
    STD_TORCH_CHECK(cuda::same_place(*t, q_), "rope_append: all tensors must be on one device");
  }
  for (const auto* t : {&cos_, &sin_, &lengths_, &table_, &q_weight_, &k_weight_}) {
    STD_TORCH_CHECK(!*t || cuda::same_place(**t, q_),
                    "rope_append: all tensors must be on one device");
  }
  const cuda::OnDevice device(q_);
  const Tensor q = unit_stride(q_), k = unit_stride(k_);
  const Tensor v = unit_stride(v_);
  const auto cos = unit_stride(cos_), sin = unit_stride(sin_);
  const auto lengths = dense(lengths_), table = dense(table_);
  const auto q_weight = dense(q_weight_), k_weight = dense(k_weight_);
  const Tensor out = empty_in_order(q_, device.type(), device.index());
  const RopeAppendArgs args =
      rope_append_arguments({q, k, v, cos, sin, k_cache, v_cache, lengths, length, table, q_weight,
                             k_weight, rotary, interleaved, eps, offset},
                            out);
  cuda::check(cuda::rope_append(args, device.stream()), "rope_append");
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlm, CUDA, m) { m.impl("rope_append", TORCH_BOX(&rope_append)); }

}  // namespace fastlm
