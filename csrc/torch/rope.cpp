// Binding of rope: allocates, splits tiles over threads, registers the CPU kernels.
#include "ops/rope.h"

#include <tuple>

#include "torch/rope.h"
#include "cpu/isa.h"

FASTLM_KERNEL_TABLE(RopeKernels, rope)

namespace fastlm {
namespace {

// Writes x, rotated, to y, which may be x.
void rotate(RopeArgs args) {
  const int64_t heads = args.heads, tokens = args.tokens;
  const int64_t row_bytes = args.head_dim * (args.dtype == DType::kFloat32 ? 4 : 2);
  // Tiles follow each other as x lies in memory. They are as small as threads can share well, but
  // neighbours lay their tables out once a tile, for several heads.
  const bool by_token = args.x_head < args.x_token;
  const int64_t rows = std::max<int64_t>(1, (args.interleaved ? 128 : 16) * 1024 / row_bytes);
  const int64_t all_heads = std::max<int64_t>(1, heads);
  const int64_t most_tokens = std::min<int64_t>(64, kRopeTableFloats / args.rotary);
  const int64_t token_block = by_token ? std::clamp<int64_t>(rows / all_heads, 1, most_tokens)
                                       : std::clamp<int64_t>(tokens, 1, most_tokens);
  const int64_t head_block =
      by_token ? all_heads : std::clamp<int64_t>(rows / token_block, 1, all_heads);
  args.head_block = head_block;
  args.token_block = token_block;
  const int64_t tiles = args.batch * ((heads + head_block - 1) / head_block) *
                        ((tokens + token_block - 1) / token_block);
  const auto kernel = rope_kernels().rotate;
  parallel_rows(tiles, 2 * token_block * head_block * row_bytes,
                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

Tensor rope_single(const Tensor& x_, const Tensor& cos_, const Tensor& sin_, int64_t rotary,
                   bool interleaved, bool transposed) {
  const Tensor x = unit_stride(x_), cos = unit_stride(cos_), sin = unit_stride(sin_);
  Tensor y = empty_in_order(x_);
  rotate(rope_arguments(x, y, cos, sin, rotary, interleaved, transposed));
  return y;
}

std::tuple<Tensor, Tensor> rope(const Tensor& q, const Tensor& k, const Tensor& cos,
                                const Tensor& sin, int64_t rotary, bool interleaved,
                                bool transposed) {
  check_two(q, k);
  return {rope_single(q, cos, sin, rotary, interleaved, transposed),
          rope_single(k, cos, sin, rotary, interleaved, transposed)};
}

void rope_single_in_place(const Tensor& x, const Tensor& cos_, const Tensor& sin_, int64_t rotary,
                          bool interleaved) {
  check_own_elements(x);
  const Tensor cos = unit_stride(cos_), sin = unit_stride(sin_);
  rotate(rope_arguments(x, x, cos, sin, rotary, interleaved, false));
}

void rope_in_place(const Tensor& q, const Tensor& k, const Tensor& cos_, const Tensor& sin_,
                   int64_t rotary, bool interleaved) {
  check_own_elements(q, k);
  const Tensor cos = unit_stride(cos_), sin = unit_stride(sin_);
  rotate(rope_arguments(q, q, cos, sin, rotary, interleaved, false));
  rotate(rope_arguments(k, k, cos, sin, rotary, interleaved, false));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, m) {
  m.impl("rope", TORCH_BOX(&rope));
  m.impl("rope_single", TORCH_BOX(&rope_single));
  m.impl("rope_", TORCH_BOX(&rope_in_place));
  m.impl("rope_single_", TORCH_BOX(&rope_single_in_place));
}

}  // namespace fastlm
