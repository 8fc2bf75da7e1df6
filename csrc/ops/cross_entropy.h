// Contract of cross_entropy: what a kernel is given.
#pragma once
#include "common/dtype.h"

namespace fastlm {

// With z a row of logits (softcap tanh(logits / softcap) where softcap > 0), lse = log(sum(e^z)), t
// its target, e the smoothing, w the class weights (ones where null),
// loss = w[t] ((1 - e) (lse - z[t]) + z_loss lse^2) + e / V sum_c w[c] (lse - z[c])
// grad[r,c] = factor scale[r] dloss[r] / dlogits[r,c]
struct CrossEntropy {
  const void* logits;         // [rows, classes]
  const int64_t* target;      // [rows], in [0, classes) or ignore_index
  const float* class_weight;  // [classes], or null
  const float* scale;         // [rows], or null for ones
  float* loss;                // [rows], 0 where ignored
  void* grad;                 // like logits, which it may overwrite; null where none is wanted
  int64_t rows, classes, ignore_index;
  float factor;
  float class_weight_sum;  // classes where class_weight is null
  float smoothing, z_loss, softcap;
  bool stream;  // whether grad bypasses the caches; its rows are then aligned to 64 bytes
  DType dtype;
};

// Floats of scratch memory that one task needs where a gradient is wanted.
inline int64_t cross_entropy_scratch(int64_t classes) { return classes + classes / 64 + 64; }

struct CrossEntropyKernels {
  void (*rows)(const CrossEntropy&, float* scratch, int64_t row_begin, int64_t row_end);
};

namespace cuda {
// What csrc/cuda/cross_entropy.cu needs beside the contract, whose class_weight_sum it finds itself
// where there are class weights. A token's loss comes multiplied by its scale.
struct CrossEntropyLaunch {
  float* work;  // 2 floats
  float* out;   // the reduced loss, or null
  bool mean;    // divide loss and gradient by the weight of the tokens that count
};
// Queues the kernels on a cudaStream_t, returns a cudaError_t. A target out of range gives NaN.
int cross_entropy(const CrossEntropy&, const CrossEntropyLaunch&, void* stream);
}  // namespace cuda

}  // namespace fastlm
