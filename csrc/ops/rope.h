// Contract of rope: what a kernel is given, on any device.
#pragma once
#include "common/dtype.h"

namespace fastlm {

// y1 = x1 cos1 - x2 sin1, y2 = x2 cos2 + x1 sin2 for the pairs of the first `rotary` elements, the
// rest is copied. `transposed`: y1 = x1 cos1 + x2 sin2, y2 = x2 cos2 - x1 sin1, the backward.
struct RopeArgs {
  const void* x;  // [batch, heads, tokens, head_dim], strides in elements, the last one 1
  void* y;        // like x, its own strides; or x itself, with the same
  int64_t x_batch, x_head, x_token;
  int64_t y_batch, y_head, y_token;
  const void *cos, *sin;                               // [batch, tokens, rotary or rotary / 2]
  int64_t cos_batch, cos_token, sin_batch, sin_token;  // batch stride 0 where tables are shared
  int64_t batch, heads, tokens, head_dim, rotary;
  int64_t head_block, token_block;  // heads and tokens of one tile
  bool full_width;                  // tables hold `rotary` angles, not half of them
  bool interleaved, transposed;
  DType dtype, table_dtype;
};

// token_block * rotary is at most this.
constexpr int64_t kRopeTableFloats = 8192;

struct RopeKernels {
  // Tiles [begin, end) of batch x head blocks x token blocks.
  void (*rotate)(const RopeArgs&, int64_t begin, int64_t end);
};

// Launcher of csrc/cuda/rope.cu: queues one kernel for one or two tensors of the same form on a
// cudaStream_t, returns a cudaError_t. The tiles of the arguments are for CPUs alone.
namespace cuda {
int rope(const RopeArgs* args, int count, void* stream);
}  // namespace cuda

}  // namespace fastlm
