// Contract of feed_forward: what its kernels are given. The last product is linear's.
#pragma once
#include "common/dtype.h"
#include "ops/activation_kind.h"
#include "ops/linear.h"

namespace fastlm {

// hidden = act(x w_in^T + b_in), or act(x w_gate^T + b_gate) * (x w_in^T + b_in)
struct FeedForwardHidden {
  Operand x, w_in, w_gate;    // [rows, in] and [out, in]; w_gate.p null: not gated
  const void *b_in, *b_gate;  // [out], or null
  void* hidden;               // [rows, out]
  void *up, *gate;            // like hidden: the projections, kept for the gradients; or null
  int64_t rows, in, out;
  Activation act;
  DType dtype;
};

// The pointwise part, on projections that are there already; gate null: act(up).
struct FeedForwardPointwise {
  const void *up, *gate;
  void* grad;    // of hidden; becomes the gradient of up; forward: null
  void* hidden;  // act(gate) * up, in both directions
  void* grad_gate;
  int64_t count;
  Activation act;
  DType dtype;
};

struct FeedForwardKernels {
  int64_t panel;  // weight rows that one item of work covers
  // a few rows, every side along `in`, x dense
  void (*hidden)(const FeedForwardHidden&, int64_t panel_begin, int64_t panel_end);
  // many rows; the columns are outputs, or two for each where it is gated, in whole tiles
  int64_t rows, cols;
  int64_t (*scratch)(const FeedForwardHidden&);  // floats of scratch memory for a region
  void (*hidden_region)(const FeedForwardHidden&, const Region&, float* scratch);
  void (*pointwise)(const FeedForwardPointwise&, int64_t begin, int64_t end);
};

}  // namespace fastlm
