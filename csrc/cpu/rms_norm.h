// rms_norm forward and backward.
// Computes   y[r,:] = s[r,:] * rsqrt(mean(s[r,:]^2) + eps) * (w + offset), s = x (+ residual)
// Algorithm  forward: pass 1 sums squares (after writing the sum), pass 2 scales from L1;
//            backward: pass 1 recomputes the statistic beside sum(g w s), pass 2 writes dx and
//            adds to the block's partial dw, four rows at a time
// Tile       row [ v0 | v1 | ... | masked tail ], four accumulators
// Traffic    forward reads x (and residual) once, writes y (and the sum); backward reads g and s,
//            writes dx; the second pass of each hits the cache
// Numerics   fp32 throughout, one rounding to the output; fixed order, same bits for any threads
// Source     arXiv:1910.07467, equation 4
#include "cpu/norm.h"

FASTLM_EXPORT(RmsNormKernels, rms_norm) = {norm_forward<false>, norm_backward<false>};
