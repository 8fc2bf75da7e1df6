// Contract of decode_attention: what a kernel is given, on any device.
#pragma once
#include "common/dtype.h"

namespace fastlm {

// out[b,h,i] = sum over the keys j that query i sees of softmax(scale q[b,h,i] . k[b,g,j]) v[b,g,j]
// with g = h / (heads / kv_heads) and query i at position lengths[b] - queries + i.
//
// A task is a piece of one key-value head of one sequence. The tasks of sequence b are
// first_task[b] ... first_task[b + 1]; all its heads are cut alike, into
// (first_task[b + 1] - first_task[b]) / kv_heads pieces of its keys from first_key[b] on.
struct Scales {  // one number for each token and key-value head, or null
  const void* data;
  int64_t batch, head, row;
  DType dtype;
};

struct DecodeMask {
  const void* data;  // null: no mask
  int64_t batch, head, row, key;
  bool added;  // fp32 to be added, else bytes: 0 hides
};

struct DecodeAttentionArgs {
  const void* q;  // [batch, heads, queries, head_dim], strides in elements, the last one 1
  const void* k;  // [batch, kv_heads, keys, head_dim]
  const void* v;  // [batch, kv_heads, keys, value_dim]
  void* out;      // [batch, heads, queries, value_dim]
  int64_t q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row;
  int64_t out_batch, out_head, out_row;
  int64_t batch, heads, kv_heads, queries, head_dim, value_dim;
  const int64_t* lengths;     // [batch] keys of each sequence, the new ones included
  const int64_t* first_key;   // [batch] the first key that any query sees
  const int64_t* first_task;  // [batch + 1]
  int64_t window;             // 0 for all keys
  float scale;
  const float* slopes;  // [heads] per sequence, or null
  int64_t slopes_batch;
  const float* sinks;  // [heads], or null
  // [tasks, heads / kv_heads * queries, value_dim + 2]: unscaled sum, maximum and sum of weights
  // of each task of a sequence in several pieces; null where no sequence is.
  float* partial;
  DType dtype;    // of q, out and, where there are no scales, of the cache
  float softcap;  // 0: none

  // Paged cache: k and v are [pages, kv_heads, page_size, dim], k_batch and v_batch are between
  // pages, and the pages of sequence b are table[b * table_row ...]. page_size 0: not paged.
  const int64_t* table;
  int64_t table_row, page_size;

  // An int8 cache: element times its token's scale. Strides like those of k and v, whose element
  // type is int8 where k_scale is given.
  Scales k_scale, v_scale;

  // [batch, heads, queries, keys] by strides; 0 for broadcast dimensions.
  DecodeMask mask;
};

constexpr int64_t kDecodeMaxHead = 256;   // largest head_dim and value_dim
constexpr int64_t kDecodeMaxPiece = 512;  // keys of one task

// Into how many pieces each head's keys are cut: about 64 tasks for a sequence, of at least 128
// keys. A function of the sequence alone, so that its result does not depend on its neighbours.
static inline int64_t decode_pieces(int64_t keys, int64_t kv_heads) {
  const int64_t by_heads = (63 + kv_heads) / kv_heads;
  const int64_t by_size = (keys + kDecodeMaxPiece - 1) / kDecodeMaxPiece;
  const int64_t wanted = by_heads > by_size ? by_heads : by_size, most = (keys + 127) / 128;
  return most < 1 ? 1 : most < wanted ? most : wanted;
}

struct DecodeAttentionKernels {
  void (*attend)(const DecodeAttentionArgs&, int64_t task_begin, int64_t task_end);
  // Joins the pieces of the rows [begin, end) of batch x heads x queries.
  void (*combine)(const DecodeAttentionArgs&, int64_t begin, int64_t end);
};

namespace cuda {

// What the GPU's kernels read themselves, where the CPU's binding makes a plan: nothing comes back
// to the host. `lengths`, `first_key`, `first_task` and `table` of the arguments are null.
struct DecodeAttentionLaunch {
  const void* lengths;  // [batch] of int32 or int64, or null: `length` for all
  int64_t length;
  const void* table;  // int32 or int64, or null
  int64_t keys;       // the cache holds for a sequence
  int64_t pages;      // of the cache
  int64_t piece;      // keys of a block
  int64_t pieces;     // of a sequence
  bool wide_lengths, wide_table;
  bool aligned;  // the launcher's: K may be read 16 bytes at once
};

constexpr int kDecodePieces = 64;  // at most

// Keys of a piece of a cache of `keys`, a multiple of 16; of the cache's size alone, so that the
// bits depend on neither lengths nor GPU.
inline int64_t decode_piece_keys(int64_t keys) {
  const int64_t even = (keys + kDecodePieces - 1) / kDecodePieces;
  return even <= 128 ? 128 : (even + 15) / 16 * 16;
}

// Launcher of csrc/cuda/decode_attention.cu: queues one or two kernels on a cudaStream_t, returns a
// cudaError_t. With several pieces `partial` is [batch * heads * queries, pieces, value_dim + 2].
int decode_attention(const DecodeAttentionArgs& args, const DecodeAttentionLaunch& more,
                     void* stream);

}  // namespace cuda

}  // namespace fastlm
