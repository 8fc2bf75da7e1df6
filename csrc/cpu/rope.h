// rope forward and backward.
// Computes   y1 = x1 c1 - x2 s1, y2 = x2 c2 + x1 s2 for each pair of the first R elements of a head
// Algorithm  halves: both elements of a vector of pairs at once, straight from the tables;
//            neighbours: the tables of a tile's tokens are first laid out in fp32 as C and S such
//            that y = x C + swapped(x) S, for all heads of the tile
// Tile       heads x tokens, walked in the order in which x lies in memory
// Traffic    reads x once, writes y; the tables come from the cache for all heads but the first.
//            y may be x: a vector of pairs is read before it is written
// Numerics   fp32, one rounding to the output
// Source     arXiv:2104.09864, equation 34
#include "cpu/rope_rows.h"

template <class T, class Tab>
void rotate_tiles(const RopeArgs& a, int64_t begin, int64_t end) {
  alignas(64) float c[kRopeTableFloats], s[kRopeTableFloats];
  const int64_t head_blocks = (a.heads + a.head_block - 1) / a.head_block;
  const int64_t token_blocks = (a.tokens + a.token_block - 1) / a.token_block;
  const size_t rest = sizeof(T) * static_cast<size_t>(a.head_dim - a.rotary);
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t t0 = tile % token_blocks * a.token_block;
    const int64_t h0 = tile / token_blocks % head_blocks * a.head_block;
    const int64_t b = tile / token_blocks / head_blocks;
    const int64_t tokens = min_of(a.token_block, a.tokens - t0);
    const int64_t heads = min_of(a.head_block, a.heads - h0);
    const Tab* cos = static_cast<const Tab*>(a.cos) + b * a.cos_batch + t0 * a.cos_token;
    const Tab* sin = static_cast<const Tab*>(a.sin) + b * a.sin_batch + t0 * a.sin_token;
    for (int64_t t = 0; t < tokens && a.interleaved; ++t) {
      lay_out(cos + t * a.cos_token, sin + t * a.sin_token, c + t * a.rotary, s + t * a.rotary,
              a.rotary, a.full_width, a.transposed);
    }
    const T* x = static_cast<const T*>(a.x) + b * a.x_batch + h0 * a.x_head + t0 * a.x_token;
    T* y = static_cast<T*>(a.y) + b * a.y_batch + h0 * a.y_head + t0 * a.y_token;
    const auto row = [&](int64_t h, int64_t t) {
      const T* from = x + h * a.x_head + t * a.x_token;
      T* to = y + h * a.y_head + t * a.y_token;
      if (a.interleaved) {
        rotate_neighbours(from, to, c + t * a.rotary, s + t * a.rotary, a.rotary);
      } else {
        rotate_halves(from, to, cos + t * a.cos_token, sin + t * a.sin_token, a.rotary / 2,
                      a.full_width ? a.rotary / 2 : 0, a.transposed);
      }
      if (rest != 0 && to != from) memcpy(to + a.rotary, from + a.rotary, rest);
    };
    if (a.x_head < a.x_token) {
      for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t h = 0; h < heads; ++h) row(h, t);
      }
    } else {
      for (int64_t h = 0; h < heads; ++h) {
        for (int64_t t = 0; t < tokens; ++t) row(h, t);
      }
    }
  }
}

void rotate(const RopeArgs& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&]<class T>(const T*) {
    if (a.table_dtype == DType::kFloat32) {
      rotate_tiles<T, float>(a, begin, end);
    } else {
      rotate_tiles<T, T>(a, begin, end);
    }
  });
}

FASTLM_EXPORT(RopeKernels, rope) = {rotate};
