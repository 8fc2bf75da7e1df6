// rope forward and backward.
// Computes   y1 = x1 c1 - x2 s1, y2 = x2 c2 + x1 s2 for each pair of the first R elements of a head
// Algorithm  the tables of a few tokens are first laid out in fp32 as C and S such that
//            y = x C + partner(x) S; every head of the tile then reads them from the cache
// Tile       heads x tokens, walked in the order in which x lies in memory
// Traffic    reads x and the tables once, writes y
// Numerics   fp32, one rounding to the output
// Source     arXiv:2104.09864, equation 34
#include "cpu/norm_rows.h"

// C and S of one token: c[i] = cos_i; s[i] is what the partner of element i is multiplied with.
template <class Tab>
inline void lay_out_halves(const RopeArgs& a, const Tab* cos, const Tab* sin, float* c, float* s) {
  const int64_t half = a.rotary / 2, second = a.full_width ? half : 0;
  const VecF sign = set1(a.transposed ? 1.0f : -1.0f);
  for_vectors(half, [&](int64_t i, auto... n) {
    const VecF s1 = load(sin + i, n...), s2 = load(sin + second + i, n...);
    store(c + i, load(cos + i, n...), n...);
    store(c + half + i, load(cos + second + i, n...), n...);
    store(s + i, sign * (a.transposed ? s2 : s1), n...);
    store(s + half + i, zero() - sign * (a.transposed ? s1 : s2), n...);
  });
}

template <class Tab>
inline void lay_out_neighbours(const RopeArgs& a, const Tab* cos, const Tab* sin, float* c,
                               float* s) {
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
inline void rotate_halves(const T* x, T* y, const float* c, const float* s, int64_t half) {
  for_vectors(half, [&](int64_t i, auto... n) {
    const VecF x1 = load(x + i, n...), x2 = load(x + half + i, n...);
    const VecF y1 = fma(x2, load(s + i, n...), x1 * load(c + i, n...));
    const VecF y2 = fma(x1, load(s + half + i, n...), x2 * load(c + half + i, n...));
    store(y + i, y1, n...);
    store(y + half + i, y2, n...);
  });
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
    for (int64_t t = 0; t < tokens; ++t, cos += a.cos_token, sin += a.sin_token) {
      if (a.interleaved) {
        lay_out_neighbours(a, cos, sin, c + t * a.rotary, s + t * a.rotary);
      } else {
        lay_out_halves(a, cos, sin, c + t * a.rotary, s + t * a.rotary);
      }
    }
    const T* x = static_cast<const T*>(a.x) + b * a.x_batch + h0 * a.x_head + t0 * a.x_token;
    T* y = static_cast<T*>(a.y) + b * a.y_batch + h0 * a.y_head + t0 * a.y_token;
    const auto row = [&](int64_t h, int64_t t) {
      const T* from = x + h * a.x_head + t * a.x_token;
      T* to = y + h * a.y_head + t * a.y_token;
      if (a.interleaved) {
        rotate_neighbours(from, to, c + t * a.rotary, s + t * a.rotary, a.rotary);
      } else {
        rotate_halves(from, to, c + t * a.rotary, s + t * a.rotary, a.rotary / 2);
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
