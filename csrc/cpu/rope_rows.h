// The rotation of one head of one token, by halves or by neighbours. Included by the kernel files,
// inside the set's namespace.
#include "cpu/norm_rows.h"

// `second`: where the tables of the second half begin, 0 where both halves share one.
template <class X, class Y, class Tab>
inline void rotate_halves(const X* x, Y* y, const Tab* cos, const Tab* sin, int64_t half,
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
inline void lay_out(const Tab* cos, const Tab* sin, float* c, float* s, int64_t rotary,
                    bool full_width, bool transposed) {
  for (int64_t i = 0; i < rotary; i += 2) {
    const int64_t first = full_width ? i : i / 2, second = full_width ? i + 1 : i / 2;
    const float s1 = fastlm::to_float(sin[first]), s2 = fastlm::to_float(sin[second]);
    c[i] = fastlm::to_float(cos[first]);
    c[i + 1] = fastlm::to_float(cos[second]);
    s[i] = transposed ? s2 : -s1;
    s[i + 1] = transposed ? -s1 : s2;
  }
}

template <class X, class Y>
inline void rotate_neighbours(const X* x, Y* y, const float* c, const float* s, int64_t rotary) {
  for_vectors(rotary, [&](int64_t i, auto... n) {
    const VecF v = load(x + i, n...);
    store(y + i, fma(swap_neighbours(v), load(s + i, n...), v * load(c + i, n...)), n...);
  });
}
