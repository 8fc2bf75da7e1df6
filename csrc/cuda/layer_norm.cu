// layer_norm forward and backward.
// Computes   y[r,:] = (s[r,:] - mean) * rsqrt(var(s[r,:]) + eps) * w + b, s = x (+ residual)
// Algorithm  norm.cuh with a mean: a row stays in the registers of its threads for the mean, the
//            squares around it and the scaling; backward keeps partial dw and db of a run of rows
//            in registers, writes one of each per run; a second kernel sums those in order
// Tile       8 threads a row (16 rows a block), 32 (4 rows), or a block of 128 or 512 a row,
//            4 vectors of 16 bytes each, 2 in the backward; longer or unaligned rows are read
//            again; few rows of 32768 columns or more are cut into pieces (norm_pieces.cuh)
// Traffic    forward reads x (and residual) once, writes y (and the sum); backward reads g and s
//            once, writes dx and 2 * runs * cols floats
// Numerics   fp32; two passes, the mean corrected by the second; sums in a fixed order that depends
//            on the shape alone, one rounding to the output
// Source     arXiv:1607.06450
#include "ops/layer_norm.h"

#include "norm.cuh"

namespace fastlm::cuda {

int64_t layer_norm_runs(int64_t rows, int64_t cols) { return norm_runs(rows, cols); }

int layer_norm_forward(const LayerNormForward& a, void* stream) {
  return norm_forward<true>(a, stream);
}

int layer_norm_backward(const LayerNormBackward& a, void* dweight, void* dbias, void* stream) {
  return norm_backward<true>(a, dweight, dbias, stream);
}

}  // namespace fastlm::cuda
