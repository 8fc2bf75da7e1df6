// The rows both norms are made of: kCentred is true for layer_norm (the mean is taken off first)
// and false for rms_norm. Included by the kernel files, inside the set's namespace.

#include "cpu/norm_rows.h"

// The weight of the lanes at i, for rms_norm plus an offset; ones where there is none.
template <bool kOffset, class W>
struct Scale {
  const W* weight;
  VecF offset;
  Scale(const void* p, float o) : weight(static_cast<const W*>(p)), offset(set1(o)) {}
  template <class... N>
  VecF operator()(int64_t i, N... n) const {
    if (weight == nullptr) return set1(1.0f);
    return kOffset ? load(weight + i, n...) + offset : load(weight + i, n...);
  }
};

// sum = x + residual, rounded as stored: the norm of what the next layer will see.
template <class T>
inline void add_rows(const T* x, const T* residual, T* sum, int64_t cols) {
  for_vectors(cols, [&](int64_t i, auto... n) {
    store(sum + i, load(x + i, n...) + load(residual + i, n...), n...);
  });
}

// What is known of a row s after the first pass. Its mean comes in two parts, a number near it that
// is taken off first and the rest, so that a mean far above the spread costs no accuracy.
struct RowStats {
  float near;
  float shift;  // (mean - near) * rstd
  float rstd;
};

inline RowStats row_stats(float near, double sum, double squares, int64_t cols, float eps) {
  const double n = static_cast<double>(cols), rest = sum / n;
  const double rstd = 1.0 / sqrt(squares / n - rest * rest + static_cast<double>(eps));
  return {near, static_cast<float>(rest * rstd), static_cast<float>(rstd)};
}

// Whether `near` was so far from the mean that the variance lost accuracy to it.
inline bool too_far(const RowStats& s) { return !(s.shift * s.shift <= 2.0f); }

// A first guess at the mean: that of the row's first vector.
template <class T>
inline float guess_mean(const T* x, int64_t cols) {
  if (cols >= kLanes) return reduce_add(load(x)) * (1.0f / kLanes);
  return reduce_add(load(x, static_cast<int>(cols))) / static_cast<float>(cols);
}

// The lanes at i of a row, for layer_norm less the number near the mean.
template <bool kCentred, class T, class... N>
inline VecF centred(const T* x, VecF near, int64_t i, N... n) {
  return kCentred ? load(x + i, n...) - near : load(x + i, n...);
}
template <bool kCentred, class T, class... N>
inline VecF normalised(const T* x, VecF near, VecF shift, VecF rstd, int64_t i, N... n) {
  const VecF c = centred<kCentred>(x, near, i, n...);
  return kCentred ? fma(c, rstd, zero() - shift) : c * rstd;
}

template <bool kCentred, class T>
inline RowStats forward_stats(const T* x, int64_t cols, float eps) {
  const auto read = [&](float near) {
    double sums[2];
    const VecF m = set1(near);
    row_sums<kCentred ? 2 : 1>(cols, sums, [&](VecF* s, int64_t i, auto... n) {
      const VecF c = centred<kCentred>(x, m, i, n...);
      s[0] = fma(c, c, s[0]);
      if (kCentred) s[1] = s[1] + c;
    });
    return row_stats(near, kCentred ? sums[1] : 0.0, sums[0], cols, eps);
  };
  if (!kCentred) return read(0.0f);
  const RowStats first = read(guess_mean(x, cols));
  return too_far(first) ? read(first.near + first.shift / first.rstd) : first;
}

template <bool kCentred, class T, class W>
void forward_rows(const NormForward& a, int64_t begin, int64_t end) {
  const Scale<!kCentred, W> scale(a.weight, a.offset);
  const W* bias = static_cast<const W*>(a.bias);
  const int64_t cols = a.cols;
  const bool past_cache = a.past_cache;
  for (int64_t r = begin; r < end; ++r) {
    const T* x = static_cast<const T*>(a.x) + r * cols;
    T* y = static_cast<T*>(a.y) + r * cols;
    if (a.residual != nullptr) {
      T* sum = static_cast<T*>(a.summed) + r * cols;
      add_rows(x, static_cast<const T*>(a.residual) + r * cols, sum, cols);
      x = sum;
    }
    const RowStats stats = forward_stats<kCentred>(x, cols, a.eps);
    const VecF near = set1(stats.near), shift = set1(stats.shift), rstd = set1(stats.rstd);
    for_vectors(cols, [&](int64_t i, auto... n) {
      const VecF h = normalised<kCentred>(x, near, shift, rstd, i, n...), w = scale(i, n...);
      const VecF v = kCentred && bias != nullptr ? fma(h, w, load(bias + i, n...)) : h * w;
      put(past_cache, y + i, v, n...);
    });
  }
  if (past_cache) stream_end();
}

// What the backward pass knows of a row before it writes the row.
struct RowSlopes {
  RowStats stats;
  float mean_gw;   // mean(g w)
  float mean_gwh;  // mean(g w h), h the normalised row
};

template <bool kCentred, class T, class W>
inline RowSlopes row_slopes(const T* x, const T* g, const Scale<!kCentred, W>& scale, int64_t cols,
                            float eps) {
  const auto read = [&](float near) -> RowSlopes {
    double sums[4];
    const VecF m = set1(near);
    row_sums<kCentred ? 4 : 2>(cols, sums, [&](VecF* s, int64_t i, auto... n) {
      const VecF c = centred<kCentred>(x, m, i, n...);
      const VecF gw = load(g + i, n...) * scale(i, n...);
      s[0] = fma(c, c, s[0]);
      s[1] = fma(gw, c, s[1]);
      if (kCentred) {
        s[2] = s[2] + c;
        s[3] = s[3] + gw;
      }
    });
    const RowStats stats = row_stats(near, kCentred ? sums[2] : 0.0, sums[0], cols, eps);
    const double columns = static_cast<double>(cols);
    const double mean_gw = kCentred ? sums[3] / columns : 0.0;
    const double mean_gwh = sums[1] / columns * stats.rstd - mean_gw * stats.shift;
    return {stats, static_cast<float>(mean_gw), static_cast<float>(mean_gwh)};
  };
  if (!kCentred) return read(0.0f);
  const RowSlopes first = read(guess_mean(x, cols));
  const RowStats& s = first.stats;
  return too_far(s) ? read(s.near + s.shift / s.rstd) : first;
}

// Writes dx of kRows rows from r on and adds their share to the block's dw and db: several rows at
// once, so that those sums and the weight are loaded once for all of them.
template <bool kCentred, int kRows, class T, class W>
inline void backward_group(const NormBackward& a, const Scale<!kCentred, W>& scale, int64_t r,
                           float* dw, float* db) {
  const int64_t cols = a.cols;
  // Beside two tensors read, stores of a quarter of a line, which AVX2's halves are, lose by it.
  const bool past_cache = a.past_cache && sizeof(T) * kLanes >= 32;
  const T* x = static_cast<const T*>(a.x) + r * cols;
  const T* g = static_cast<const T*>(a.grad) + r * cols;
  const T* extra = static_cast<const T*>(a.grad_summed);
  if (extra != nullptr) extra += r * cols;
  T* dx = static_cast<T*>(a.dx) + r * cols;
  VecF near[kRows], shift[kRows], rstd[kRows], mean_gw[kRows], mean_gwh[kRows];
  for (int k = 0; k < kRows; ++k) {
    const RowSlopes s = row_slopes<kCentred>(x + k * cols, g + k * cols, scale, cols, a.eps);
    near[k] = set1(s.stats.near);
    shift[k] = set1(s.stats.shift);
    rstd[k] = set1(s.stats.rstd);
    mean_gw[k] = set1(s.mean_gw);
    mean_gwh[k] = set1(s.mean_gwh);
  }
  // A line of a row at a time: rows may lie a multiple of a page apart, where a line that is left
  // half read or half written has to make room for those of the other rows.
  const auto columns = [&]<int kVectors>(int64_t i, auto... n) {
    VecF w[kVectors], sum_gh[kVectors], sum_g[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      w[v] = scale(i + v * kLanes, n...);
      sum_gh[v] = sum_g[v] = zero();
    }
    for (int k = 0; k < kRows; ++k) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const int64_t at = k * cols + i + v * kLanes;
        const VecF gi = load(g + at, n...);
        const VecF h = normalised<kCentred>(x, near[k], shift[k], rstd[k], at, n...);
        const VecF gw = kCentred ? gi * w[v] - mean_gw[k] : gi * w[v];
        VecF d = (gw - h * mean_gwh[k]) * rstd[k];
        if (extra != nullptr) d = d + load(extra + at, n...);
        put(past_cache, dx + at, d, n...);
        sum_gh[v] = fma(gi, h, sum_gh[v]);
        sum_g[v] = sum_g[v] + gi;
      }
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = i + v * kLanes;
      if (dw != nullptr) store(dw + at, load(dw + at, n...) + sum_gh[v], n...);
      if (kCentred && db != nullptr) store(db + at, load(db + at, n...) + sum_g[v], n...);
    }
  };
  constexpr int kLine = static_cast<int>(64 / sizeof(T)) / kLanes;  // its vectors
  int64_t i = 0;
  for (; i + kLine * kLanes <= cols; i += kLine * kLanes) columns.template operator()<kLine>(i);
  for (; i + kLanes <= cols; i += kLanes) columns.template operator()<1>(i);
  if (i < cols) columns.template operator()<1>(i, static_cast<int>(cols - i));
}

template <bool kCentred, class T, class W>
void backward_rows(const NormBackward& a, int64_t begin, int64_t end) {
  constexpr int kRows = 4;
  const Scale<!kCentred, W> scale(a.weight, a.offset);
  const size_t bytes = sizeof(float) * static_cast<size_t>(a.cols);
  for (int64_t block = begin; block < end; ++block) {
    float* dw = a.dweight_blocks == nullptr ? nullptr : a.dweight_blocks + block * a.cols;
    float* db = a.dbias_blocks == nullptr ? nullptr : a.dbias_blocks + block * a.cols;
    if (dw != nullptr) memset(dw, 0, bytes);
    if (db != nullptr) memset(db, 0, bytes);
    const int64_t last = block_start(block + 1, a.rows, a.blocks);
    int64_t r = block_start(block, a.rows, a.blocks);
    for (; r + kRows <= last; r += kRows) backward_group<kCentred, kRows, T>(a, scale, r, dw, db);
    for (; r < last; ++r) backward_group<kCentred, 1, T>(a, scale, r, dw, db);
  }
  if (a.past_cache) stream_end();
}

// Calls f for the argument's element types; weight and bias are fp32 or like x.
template <class Args, class F>
inline void with_types(const Args& a, F&& f) {
  with_type(a.dtype, [&]<class T>(const T* x) {
    if (a.weight_dtype == DType::kFloat32) {
      f(x, static_cast<const float*>(nullptr));
    } else {
      f(x, x);
    }
  });
}

template <bool kCentred>
void norm_forward(const NormForward& a, int64_t begin, int64_t end) {
  with_types(a, [&]<class T, class W>(const T*, const W*) {
    forward_rows<kCentred, T, W>(a, begin, end);
  });
}
template <bool kCentred>
void norm_backward(const NormBackward& a, int64_t begin, int64_t end) {
  with_types(a, [&]<class T, class W>(const T*, const W*) {
    backward_rows<kCentred, T, W>(a, begin, end);
  });
}
