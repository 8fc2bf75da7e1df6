// Binding of rope: allocates, splits tiles over threads, registers the CPU kernels.
#include "ops/rope.h"

#include <tuple>

#include "torch/alloc.h"
#include "cpu/isa.h"

FASTLM_KERNEL_TABLE(RopeKernels, rope)

namespace fastlm {
namespace {

// A fresh tensor of x's shape [B, H, T, D] that lies in memory as x does: tokens within heads, or
// heads within tokens, as the projections of a model leave them.
Tensor empty_in_order(const Tensor& x) {
  const int64_t heads = x.size(1), tokens = x.size(2), size = x.size(3);
  if (x.stride(1) >= x.stride(2)) return empty_cpu_like(x);
  const int64_t sizes[] = {x.size(0), heads, tokens, size};
  const int64_t strides[] = {std::max<int64_t>(heads * tokens * size, 1),
                             std::max<int64_t>(size, 1), std::max<int64_t>(heads * size, 1), 1};
  return empty_strided(sizes, strides, 4, x.scalar_type(), aoti_torch_device_type_cpu(), 0);
}

Tensor rope_single(const Tensor& x_, const Tensor& cos_, const Tensor& sin_, int64_t rotary,
                   bool interleaved, bool transposed) {
  const Tensor x = unit_stride(x_), cos = unit_stride(cos_), sin = unit_stride(sin_);
  Tensor y = empty_in_order(x_);
  const int64_t batch = x.size(0), heads = x.size(1), tokens = x.size(2), head_dim = x.size(3);
  const bool per_batch = cos.dim() == 3 && cos.size(0) > 1;
  const int64_t width = cos.size(-1);
  STD_TORCH_CHECK(x.dim() == 4 && rotary > 0 && rotary % 2 == 0 &&
                      rotary <= std::min(head_dim, kRopeTableFloats) &&
                      (width == rotary || 2 * width == rotary) && cos.size(-2) == tokens &&
                      cos.dim() <= 3 && (!per_batch || cos.size(0) == batch) &&
                      cos.sizes() == sin.sizes() && cos.scalar_type() == sin.scalar_type() &&
                      (cos.scalar_type() == x.scalar_type() || dtype_of(cos) == DType::kFloat32),
                  "rope: the arguments do not fit each other");
  const int64_t row_bytes = head_dim * (dtype_of(x) == DType::kFloat32 ? 4 : 2);
  // Tiles follow each other as x lies in memory. They are as small as threads can share well, but
  // neighbours lay their tables out once a tile, for several heads.
  const bool by_token = x.stride(1) < x.stride(2);
  const int64_t rows = std::max<int64_t>(1, (interleaved ? 128 : 16) * 1024 / row_bytes);
  const int64_t all_heads = std::max<int64_t>(1, heads);
  const int64_t most_tokens = std::min<int64_t>(64, kRopeTableFloats / rotary);
  const int64_t token_block = by_token ? std::clamp<int64_t>(rows / all_heads, 1, most_tokens)
                                       : std::clamp<int64_t>(tokens, 1, most_tokens);
  const int64_t head_block =
      by_token ? all_heads : std::clamp<int64_t>(rows / token_block, 1, all_heads);
  const RopeArgs args{x.const_data_ptr(),
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
                      head_block,
                      token_block,
                      width == rotary,
                      interleaved,
                      transposed,
                      dtype_of(x),
                      dtype_of(cos)};
  const int64_t tiles =
      batch * ((heads + head_block - 1) / head_block) * ((tokens + token_block - 1) / token_block);
  const auto kernel = rope_kernels().rotate;
  parallel_rows(tiles, 2 * token_block * head_block * row_bytes,
                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return y;
}

std::tuple<Tensor, Tensor> rope(const Tensor& q, const Tensor& k, const Tensor& cos,
                                const Tensor& sin, int64_t rotary, bool interleaved,
                                bool transposed) {
  STD_TORCH_CHECK(q.size(0) == k.size(0) && q.size(2) == k.size(2) && q.size(3) == k.size(3) &&
                      q.scalar_type() == k.scalar_type(),
                  "rope: q and k do not fit each other");
  return {rope_single(q, cos, sin, rotary, interleaved, transposed),
          rope_single(k, cos, sin, rotary, interleaved, transposed)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, m) {
  m.impl("rope", TORCH_BOX(&rope));
  m.impl("rope_single", TORCH_BOX(&rope_single));
}

}  // namespace fastlm
