// Contract of attention: what a kernel is given, on any device.
#pragma once
#include "common/dtype.h"

namespace fastlm {

// [batch, heads, rows, size] with unit last stride; strides in elements. Packed sequences have
// batch stride 0: sequence b starts at the row its table names.
struct HeadRows {
  void* data;
  int64_t batch, head, row;
};

enum class MaskKind : int { kNone, kBool, kFloat32, kBFloat16, kFloat16 };

// out_i = sum_j softmax_j(s_ij) v_j, s_ij = cap(scale q_i . k_j) - slope |p_i - j| + mask_ij over
// the keys that query i, at position p_i = i + tk - tq, sees.
struct Attention {
  HeadRows q, k, v;
  int64_t batch, heads, kv_heads, tq, tk, d, dv;  // packed: tq, tk of the longest sequence
  const int32_t *starts_q, *starts_k;             // packed: [batch + 1] first rows, else null
  const void* mask;                               // broadcast dimensions have stride 0
  int64_t mask_batch, mask_head, mask_row, mask_key;
  // What the mask does to a row and a block of keys: the number of keys up to the last one seen (0:
  // all are hidden), and kMaskActs where it hides or adds anything before that. One byte for each
  // block of keys and row of the mask, rows lying together; broadcast dimensions are there once.
  uint8_t* mask_blocks;
  int64_t mask_blocks_batch, mask_blocks_head, mask_blocks_key, mask_blocks_row;
  const float *slopes, *sinks;  // [heads] or null
  int64_t slopes_batch;         // stride between sequences, 0 where all share them
  int64_t window;               // 0: none
  float scale, softcap;         // softcap 0: none
  bool causal;
  MaskKind mask_kind;
  DType dtype;
  int64_t lse_batch, lse_head;  // strides of the fp32 tables lse and grad_lse, unit along rows
  int64_t lse_size;             // numbers in such a table
};

// Queries and keys are worked on in blocks of this many rows on every instruction set.
constexpr int64_t kAttentionBlock = 64;
constexpr uint8_t kMaskActs = 0x80;

struct AttentionForward {
  Attention a;
  HeadRows out;
  float* lse;               // log of the softmax denominator, or null; then what fp32 rounded off
  int64_t blocks_per_task;  // query blocks
};

// With delta_i = grad_i . out_i - grad_lse_i and ds_ij = p_ij (grad_i . v_j - delta_i):
// dq = scale ds k, dk = scale ds^T q, dv = p^T grad.
struct AttentionBackward {
  Attention a;
  HeadRows out, grad, dq, dk, dv;
  const float *lse, *grad_lse;  // lse as forward wrote it; grad_lse or null
  int64_t blocks_per_task;      // key (or query) blocks of a task, when split
  bool split;  // false: a task makes all of one kv head; true: tasks for dk, dv and tasks for dq
};

// A worker owns `scratch` of the given number of floats, aligned to 64 bytes. The results do not
// depend on how the work is cut into tasks nor on who runs them.
struct AttentionKernels {
  // Fills mask_blocks for the rows [begin, end) of all rows of the mask, broadcast ones once.
  void (*read_mask)(const Attention&, int64_t begin, int64_t end);
  int64_t (*forward_scratch)(const AttentionForward&);
  void (*forward)(const AttentionForward&, int64_t task, float* scratch);
  int64_t (*backward_scratch)(const AttentionBackward&);
  void (*backward)(const AttentionBackward&, int64_t task, float* scratch);
  // Of the heads [begin, end) of batch x heads, to `gradients`; needs out, grad, lse, grad_lse, the
  // sinks and the shape of the queries.
  void (*sink_gradient)(const AttentionBackward&, int64_t begin, int64_t end, double* gradients);
};

inline int64_t attention_blocks(int64_t rows) {
  return (rows + kAttentionBlock - 1) / kAttentionBlock;
}

// Tasks of a call: per sequence and kv head, chunks of query blocks (all queries of the head's
// group counted), and for the split backward chunks of key blocks besides.
inline int64_t attention_query_chunks(const Attention& a, int64_t blocks_per_task) {
  const int64_t blocks = attention_blocks(a.tq * (a.heads / a.kv_heads));
  return (blocks + blocks_per_task - 1) / blocks_per_task;
}
inline int64_t attention_key_chunks(const Attention& a, int64_t blocks_per_task) {
  return (attention_blocks(a.tk) + blocks_per_task - 1) / blocks_per_task;
}

}  // namespace fastlm
