// Contract of rope_append: what a kernel is given, on any device.
#pragma once
#include "common/dtype.h"

namespace fastlm {

// Token t of sequence b stands at p = lengths[b] - tokens + t. out = turn(norm(q), p); the caches
// receive turn(norm(k), p) and v at p. turn is the rotation of ops/rope.h by row p of the tables,
// norm is x rsqrt(mean(x^2) + eps) (weight + offset) over a head; both may be absent.
//
// A token with p < 0, p >= `places` or beyond the cache (or on a page that is none) is to be left
// out: nothing is written for it, its row of out is zero. The CPU's binding refuses such lengths
// before; elsewhere only the kernel reads them.
struct RopeAppendArgs {
  const void* q;  // [batch, heads, tokens, head_dim], strides in elements, the last one 1
  const void* k;  // [batch, kv_heads, tokens, head_dim]
  const void* v;  // [batch, kv_heads, tokens, value_dim]
  void* out;      // like q
  void* k_cache;  // [batch or pages, kv_heads, keys or page_size, head_dim]
  void* v_cache;  // the same with value_dim
  int64_t q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token;
  int64_t out_batch, out_head, out_token;
  int64_t k_cache_row, k_cache_head, k_cache_token, v_cache_row, v_cache_head, v_cache_token;
  const void *cos, *sin;             // [places, rotary or rotary / 2]; null: nothing turns
  int64_t cos_row, sin_row, places;  // places: the largest int64 without tables
  const void *q_weight, *k_weight;   // [head_dim], or null: no norm
  const void* lengths;               // [batch], or null: `length` for all
  int64_t length;
  const void* table;                      // [batch, pages of a sequence], or null: not paged
  int64_t table_row, table_pages, pages;  // pages: of the whole cache
  int64_t page_size;                      // tokens of a page, or of a sequence's cache
  int64_t batch, heads, kv_heads, tokens, head_dim, value_dim, rotary;
  float eps, offset;
  bool wide_lengths, wide_table;  // int64, else int32
  bool full_width;                // tables hold `rotary` angles, not half of them
  bool interleaved;
  DType dtype, table_dtype, weight_dtype;
};

constexpr int64_t kRopeAppendMaxHead = 1024;  // largest head_dim and value_dim

struct RopeAppendKernels {
  // Tokens [begin, end) of batch x tokens, all heads of each.
  void (*append)(const RopeAppendArgs&, int64_t begin, int64_t end);
};

// Launcher of csrc/cuda/rope_append.cu: queues one kernel on a cudaStream_t, returns a cudaError_t.
namespace cuda {
int rope_append(const RopeAppendArgs& args, void* stream);
}  // namespace cuda

}  // namespace fastlm
