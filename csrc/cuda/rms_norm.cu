// rms_norm forward and backward.
// Computes   y[r,:] = s[r,:] * rsqrt(mean(s[r,:]^2) + eps) * (w + offset), s = x (+ residual)
// Algorithm  norm.cuh without a mean: a row stays in the registers of its threads between the sum
//            and the scaling; backward sums s*s and g*w*s together, adds to its own dw in registers
//            over a run of rows, writes one partial dw per run; a second kernel sums those in order
// Tile       8 threads a row (16 rows a block), 32 (4 rows), or a block of 128 or 512 a row,
//            4 vectors of 16 bytes each; longer or unaligned rows are read twice instead; few rows
//            of 32768 columns or more are cut into pieces of 1024 (norm_pieces.cuh)
// Traffic    forward reads x (and residual) once, writes y (and the sum); backward reads g and s
//            once, writes dx and runs * cols floats
// Numerics   fp32 sums in a fixed order that depends on the shape alone, one rounding to the output
// Source     arXiv:1910.07467, equation 4
#include "ops/rms_norm.h"

#include "norm.cuh"

namespace fastlm::cuda {

int64_t rms_norm_runs(int64_t rows, int64_t cols) { return norm_runs(rows, cols); }

int rms_norm_forward(const RmsNormForward& a, void* stream) {
  return norm_forward<false>(a, stream);
}

int rms_norm_backward(const RmsNormBackward& a, void* dweight, void* stream) {
  return norm_backward<false>(a, dweight, nullptr, stream);
}

}  // namespace fastlm::cuda
