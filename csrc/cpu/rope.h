// rope forward and backward.
// Computes   y1 = x1 c1 - x2 s1, y2 = x2 c2 + x1 s2 for each pair of the first R elements of a head
// Algorithm  halves: both elements of a vector of pairs at once, straight from the tables;
//            neighbours: the tables of a tile's tokens are first laid out in fp32 as C and S such
//            that y = x C + swapped(x) S, for all heads of the tile
// Tile       heads x tokens, walked in the order in which x lies in memory
// Traffic    reads x once, writes y; the tables come from the cache for all heads but the first
// Numerics   fp32, one rounding to the output
// Source     arXiv:2104.09864, equation 34
#include "cpu/norm_rows.h"

// `second`: where the tables of the second half begin, 0 where both halves share one.
template <class T, class Tab>
inline void rotate_halves(const T* x, T* y, const Tab* cos, const Tab* sin, int64_t half,
                          int64_t second, bool transposed) {
  for_vectors(half, [&](int64_t i, auto... n) {
    const VecF x1 = load(x + i, n...), x2 = load(x + half + i, n...);
    const VecF a = x1 * load(cos + i, n...), b = x2 * load(cos + second + i, n...);
    const VecF s1 = load(sin + i, n...), s2 = load(sin + second + i, n...);
    store(y + i, transposed ? fma(x2, s2, a) : fma(zero() - x2, s1, a), n...);
    store(y + half + i, transposed ? fma(zero() - x1, s1, b) : fma(x1, s2, b), n...);
  });
}

// C and S of one token: c[i] = cos_i; s[i] is what the neighbour of element i is multiplied with.
template <class Tab>
inline void lay_out(const RopeArgs& a, const Tab* cos, const Tab* sin, float* c, float* s) {
  for (int64_t i = 0; i < a.rotary; i += 2) {
    const int64_t first = a.full_width ? i : i / 2, second = a.full_width ? i + 1 : i / 2;
    const float s1 = fastlm::to_float(sin[first]), s2 = fastlm::to_float(sin[second]);
    c[i] = fastlm::to_float(cos[first]);
    c[i + 1] = fastlm::to_float(cos[second]);
    s[i] = a.transposed ? s2 : -s1;
    s[i + 1] = a.transposed ? -s1 : s2;
  }
}

template <class T>
inline void rotate_neighbours(const T* x, T* y, const float* c, const float* s, int64_t rotary) {
  for_vectors(rotary, [&](int64_t i, auto... n) {
    const VecF v = load(x + i, n...);
    store(y + i, fma(swap_neighbours(v), load(s + i, n...), v * load(c + i, n...)), n...);
  });
}

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
      lay_out(a, cos + t * a.cos_token, sin + t * a.sin_token, c + t * a.rotary, s + t * a.rotary);
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
      if (rest != 0) memcpy(to + a.rotary, from + a.rotary, rest);
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
  if (a.dtype == DType::kFloat32) {
    rotate_tiles<float, float>(a, begin, end);
  } else if (a.table_dtype == DType::kFloat32) {
    rotate_tiles<bf16, float>(a, begin, end);
  } else {
    rotate_tiles<bf16, bf16>(a, begin, end);
  }
}

FASTLM_EXPORT(RopeKernels, rope) = {rotate};
