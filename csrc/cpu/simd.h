// The vector vocabulary every CPU kernel is written in, in three spellings.
//
//   VecF                 kLanes floats; + - * / work on it
//   load(p), load(p, n)  from float, bf16, fp16 or int8; the second reads n < kLanes lanes, rest 0
//   store(p, v[, n])     to float, bf16 or fp16, rounding to nearest even
//   store_two(p, a, b)   2 kLanes bf16 values
//   stream(p, v)         store past the caches, p aligned to the vector; stream_end() after the
//                        last
//   set1, zero, fma(a, b, c) = a * b + c, vmax, vmin, vabs, vsqrt, vround (to nearest even)
//   pow2(v, n) = v * 2^n for integral n <= 128; 0 below -126 (AVX-512: denormals), v NaN or not
//   below(i, n)          mask of the lanes i + lane < n; select(mask, a, b)
//   less(a, b)           mask; any(m) whether a lane is set
//   reduce_add, reduce_max   in a fixed order
//   reduce_lanes(v[kLanes])  the sums of kLanes vectors as one vector
//   swap_neighbours(v)   lanes 1, 0, 3, 2, ...
//   transpose(r)         r[0 .. kLanes) as a square matrix, in place
//   VecH, load_pairs(p[, n])  2 kLanes bf16 values; dot2(acc, a, b): acc[l] += a[2l]b[2l] +
//                        a[2l+1]b[2l+1]; broadcast_pair(p) the bf16 pair at p in every lane;
//                        pair_up(a, b) lane l holds bf16(a[l]), bf16(b[l]); load_pairs(p, q[, n])
//                        p[l], q[l]
//   zip(a, b, lo, hi)    pairs (a[i], b[i]) of bf16 values, in an order that suits the processor;
//   unzip(lo, hi)        puts sums made from lo and hi back into the order of i, in place
//   as_float(h), as_pairs(v)  the same bits as the other kind of vector
//   kFastPairs           whether dot2 is one instruction
//   VecI                 4 kLanes bytes, or kLanes int32: load_bytes(p), set1_int(i)
//   dot4(acc, u, s)      acc[l] += u[4l]s[4l] + ... + u[4l+3]s[4l+3], u unsigned bytes, s signed;
//   exact
//                        where no |s| exceeds 64, or no u 128 and no |s| 127
//   kFastBytes           whether dot4 is one instruction, and then exact always
//   and_bytes(v, b), flip_bytes(v, b)  every byte of v and b, or exclusive or b; high_nibbles(v);
//                        byte_of<j>(v) byte j of every lane as an int32
//   shift_add<n>(a, b) = (a << n) + b and to_lanes(v), int32 to float, by lane
//
// No include guard and no includes: target.cpp includes it once, inside the set's namespace.
template <class T>
inline T min_of(T a, T b) {
  return a < b ? a : b;
}
template <class T>
inline T max_of(T a, T b) {
  return a < b ? b : a;
}

#if defined(__AVX512F__)
#include "cpu/simd_avx512.h"
#elif defined(__AVX2__)
#include "cpu/simd_avx2.h"
#else
#include "cpu/simd_baseline.h"
#endif
