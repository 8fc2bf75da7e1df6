// Contract of sample: what a kernel is given, on any device.
#pragma once
#include "common/dtype.h"

namespace fastlm {

// One token per row, drawn with the probabilities softmax(logits / temperature) of what top_k,
// top_p and min_p leave.
struct Sample {
  const void* logits;     // [rows, vocab], rows `row_stride` apart
  const double* uniform;  // [rows], in [0, 1)
  int64_t* token;         // [rows]
  int64_t rows, vocab, row_stride;
  int64_t top_k;        // vocab for all
  float temperature;    // 0: the first of the largest logits
  double top_p, min_p;  // 1 and 0 for all
  DType dtype;
};

struct SampleKernels {
  int64_t (*scratch)(int64_t vocab);  // floats that one row needs
  // false: a logit is NaN or +inf, or none is above -inf
  bool (*forward)(const Sample&, int64_t row, float* scratch);
};

// Launcher of csrc/cuda/sample.cu: queues one kernel on a cudaStream_t, returns a cudaError_t. A
// row that has no distribution gets the token -1.
namespace cuda {
int sample(const Sample& args, void* stream);
}  // namespace cuda

}  // namespace fastlm
