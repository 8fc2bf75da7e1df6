// Contract of feed_forward: what its kernels are given. The last product is linear's.
#pragma once
#include "common/dtype.h"
#include "ops/activation_kind.h"

namespace fastlm {

// hidden = act(x w_in^T + b_in), or act(x w_gate^T + b_gate) * (x w_in^T + b_in)
struct FeedForwardHidden {
  const void* x;  // [rows, in]
  const void *w_in, *w_gate;
  const void *b_in, *b_gate;  // [out], or null
  void* hidden;               // [rows, out]
  void *up, *gate;            // like hidden: the projections, kept for the gradients; or null
  int64_t rows, in, out;
  int64_t ld_in, ld_gate;  // between the rows of a weight
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
  void (*hidden)(const FeedForwardHidden&, int64_t panel_begin, int64_t panel_end);
  void (*pointwise)(const FeedForwardPointwise&, int64_t begin, int64_t end);
};

}  // namespace fastlm
