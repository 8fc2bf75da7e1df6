// layer_norm forward and backward.
// Computes   y[r,:] = (s[r,:] - mean) * rsqrt(var + eps) * w + b, s = x (+ residual)
// Algorithm  forward: pass 1 sums (after writing the sum x + residual), pass 2 sums squares of
//            s - mean, pass 3 writes y; backward: passes 1 and 2 recompute the statistics beside
//            sum(g w) and sum(g w (s - mean)), pass 3 writes dx and adds to the block's partial dw
//            and db, four rows at a time
// Tile       row [ v0 | v1 | ... | masked tail ], four accumulators
// Traffic    forward reads x (and residual) once, writes y (and the sum); backward reads g and s,
//            writes dx; later passes hit the cache
// Numerics   fp32 sums, the mean corrected and the variance taken in the second pass (a mean far
//            above the spread costs nothing), one rounding to the output; fixed order, same bits
//            for any threads
// Source     arXiv:1607.06450
#include "cpu/norm.h"

FASTLM_EXPORT(LayerNormKernels, layer_norm) = {norm_forward<true>, norm_backward<true>};
