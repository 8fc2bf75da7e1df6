// The gradients of linear_cross_entropy: products whose operands run along the result, not along k.
// Computes   sums[m, n] (+)= sum_k a[k, m] b[k, n]: dweight = dlogits^T x, dx = dlogits weight
// Algorithm  outer products: a block of b is packed into tiles of two vectors and stays in L2 while
//            panels of a pass by, each packed so that its values are broadcast in order; what comes
//            next of a is prefetched, because no hardware follows rows of the vocabulary's length
// Tile       14 rows by 2 vectors in registers (6 with AVX2), 256 of k (512 in bf16) at a time;
//            smaller tiles for the last rows
// Traffic    b once per task, a once per block of columns, the sums once per block of k
// Numerics   fp32 sums in an order that depends on the shapes only
// Source     Goto and van de Geijn, doi:10.1145/1356052.1356053 (packed panels)

constexpr int64_t kTile = 2 * kLanes;              // columns
constexpr int kPanel = kLanes == 16 ? 14 : 6;      // rows
constexpr int64_t kDeep = 256;                     // of k, in operands
constexpr int64_t kPanelFloats = 16 * kDeep + 16;  // a packed panel

// How values lie in packed operands: floats, or bf16 pairs of two following k where the processor
// multiplies those.
struct Singles {
  static constexpr int64_t kPer = 1;
  using Vec = VecF;
  static Vec vec(const float* p) { return load(p); }
  static Vec value(const float* p) { return set1(*p); }
  static VecF add(VecF acc, Vec a, Vec b) { return fma(a, b, acc); }
  static void order(VecF&, VecF&) {}
};
struct Pairs {
  static constexpr int64_t kPer = 2;
  using Vec = VecH;
  static Vec vec(const float* p) { return load_pairs(reinterpret_cast<const bf16*>(p)); }
  static Vec value(const float* p) { return broadcast_pair(reinterpret_cast<const bf16*>(p)); }
  static VecF add(VecF acc, Vec a, Vec b) { return dot2(acc, a, b); }
  static void order(VecF& low, VecF& high) { unzip(low, high); }
};

// b[k0 .. k0 + depth) x columns [n0, n0 + width) to tiles [operand of k][kTile].
template <class T>
void pack_columns(Singles, const ColumnProduct& p, int64_t k0, int64_t depth, int64_t n0,
                  int64_t width, float* to) {
  for (int64_t j = 0; j < width; j += kTile, to += depth * kTile) {
    const T* from = static_cast<const T*>(p.b) + k0 * p.b_stride + n0 + j;
    const int64_t n = min_of(kTile, width - j);
    for (int64_t k = 0; k < depth; ++k, from += p.b_stride) {
      float* row = to + k * kTile;
      if (n == kTile) {
        store(row, load(from));
        store(row + kLanes, load(from + kLanes));
      } else {
        const int low = static_cast<int>(min_of<int64_t>(n, kLanes)), high = n - low;
        store(row, low == kLanes ? load(from) : load(from, low));
        store(row + kLanes, high > 0 ? load(from + kLanes, high) : zero());
      }
    }
  }
}
template <class T>
void pack_columns(Pairs, const ColumnProduct& p, int64_t k0, int64_t depth, int64_t n0,
                  int64_t width, float* to) {
  const auto row = [](const T* from, int64_t n) {
    return n == kTile ? load_pairs(from) : load_pairs(from, static_cast<int>(n));
  };
  for (int64_t j = 0; j < width; j += kTile) {
    const T* from = static_cast<const T*>(p.b) + k0 * p.b_stride + n0 + j;
    const int64_t n = min_of(kTile, width - j);
    for (int64_t k = 0; k < depth; k += 2, from += 2 * p.b_stride, to += kTile) {
      const VecH even = row(from, n);
      const VecH odd = k + 1 < depth ? row(from + p.b_stride, n) : as_pairs(zero());
      VecH low, high;
      zip(even, odd, low, high);
      store(to, as_float(low));
      store(to + kLanes, as_float(high));
    }
  }
}

// a[k0 .. k0 + depth) x rows [m0, m0 + rows) to [operand of k][kRows], zeros beyond the rows. Whole
// vectors are stored; what they write beyond kRows the next ones overwrite.
template <class T>
inline VecF operand(Singles, const T* p, int n) {
  return load(p, n);
}
template <class T>
inline VecF operand(Pairs, const T* p, int n) {
  return as_float(load_pairs(p, n));
}
template <class T>
inline VecF operand(Singles, const T* p) {
  return load(p);
}
template <class T>
inline VecF operand(Pairs, const T* p) {
  return as_float(load_pairs(p));
}

// Rows that run along k: squares of kLanes operands of kLanes rows are turned.
template <class E, int kRows, class T>
void pack_along_k(const ColumnProduct& p, const T* from, int64_t depth, int64_t rows, float* to) {
  constexpr int64_t kStep = kLanes * E::kPer;
  for (int64_t k = 0; k < depth; k += kStep) {
    const int64_t left = min_of(kStep, depth - k), operands = (left + E::kPer - 1) / E::kPer;
    for (int64_t i0 = 0; i0 < kRows; i0 += kLanes) {
      VecF square[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        const T* row = from + (i0 + i) * p.a_stride_m + k;
        square[i] = i0 + i >= min_of<int64_t>(rows, kRows) ? zero()
                    : left == kStep ? operand(E{}, row)
                                    : operand(E{}, row, static_cast<int>(left));
      }
      transpose(square);
      for (int64_t j = 0; j < operands; ++j) {
        float* row = to + j * kRows + i0;
        if (i0 > 0 && kRows - i0 < kLanes) {
          store(row, square[j], static_cast<int>(kRows - i0));  // what follows is there already
        } else {
          store(row, square[j]);
        }
      }
    }
    to += operands * kRows;
  }
}

template <class T>
inline VecF operand_down(Singles, const T* p, int64_t, bool, int n) {
  return load(p, n);
}
template <class T>
inline VecF operand_down(Pairs, const T* p, int64_t stride, bool both, int n) {
  return as_float(pair_up(load(p, n), both ? load(p + stride, n) : zero()));
}

// Rows that lie side by side.
template <class E, int kRows, class T>
void pack_across(const ColumnProduct& p, const T* from, int64_t depth, int64_t rows, float* to) {
  for (int64_t k = 0; k < depth; k += E::kPer, from += E::kPer * p.a_stride_k, to += kRows) {
    const bool both = k + 1 < depth;
    __builtin_prefetch(from + kRows, 0, 2);
    if (E::kPer == 2 && both) __builtin_prefetch(from + p.a_stride_k + kRows, 0, 2);
    for (int64_t i = 0; i < kRows; i += kLanes) {
      const int n = static_cast<int>(max_of<int64_t>(min_of<int64_t>(kLanes, rows - i), 0));
      store(to + i, operand_down(E{}, from + i, p.a_stride_k, both, n));
    }
  }
}

template <class E, int kRows, class T>
void pack_panel(const ColumnProduct& p, int64_t k0, int64_t depth, int64_t m0, int64_t rows,
                float* to) {
  const T* from = static_cast<const T*>(p.a) + k0 * p.a_stride_k + m0 * p.a_stride_m;
  if (p.a_stride_k == 1) return pack_along_k<E, kRows>(p, from, depth, rows, to);
  pack_across<E, kRows>(p, from, depth, rows, to);
}

// Where a tile's sums go.
struct Place {
  int64_t m, rows, n, cols;
  bool add;
};

template <class... N>
inline void put(const Place& at, float* sums, VecF v, N... n) {
  store(sums, at.add ? v + load(sums, n...) : v, n...);
}

template <class E, int kRows>
void tile(const ColumnProduct& p, const float* a, const float* b, int64_t operands,
          const Place& at) {
  VecF acc[2 * kRows];
#pragma GCC unroll 28
  for (int i = 0; i < 2 * kRows; ++i) acc[i] = zero();
  for (int64_t k = 0; k < operands; ++k, a += kRows, b += kTile) {
    const typename E::Vec low = E::vec(b), high = E::vec(b + kLanes);
#pragma GCC unroll 14
    for (int i = 0; i < kRows; ++i) {
      const typename E::Vec value = E::value(a + i);
      acc[2 * i] = E::add(acc[2 * i], value, low);
      acc[2 * i + 1] = E::add(acc[2 * i + 1], value, high);
    }
  }
#pragma GCC unroll 14
  for (int i = 0; i < kRows; ++i) {
    if (i >= at.rows) break;
    VecF low = acc[2 * i], high = acc[2 * i + 1];
    E::order(low, high);
    float* sums = p.sums + (at.m + i) * p.n + at.n;
    if (at.cols >= kTile) {
      put(at, sums, low);
      put(at, sums + kLanes, high);
    } else if (at.cols < kLanes) {
      put(at, sums, low, static_cast<int>(at.cols));
    } else {
      put(at, sums, low);
      if (at.cols > kLanes) put(at, sums + kLanes, high, static_cast<int>(at.cols - kLanes));
    }
  }
}

// One panel of the result: rows [at.m, at.m + at.rows), columns [at.n, at.n + width).
template <class E, int kRows, class T>
void panel_rows(const ColumnProduct& p, int64_t k0, int64_t depth, Place at, int64_t width,
                const float* b, float* a) {
  const int64_t operands = (depth + E::kPer - 1) / E::kPer;
  pack_panel<E, kRows, T>(p, k0, depth, at.m, at.rows, a);
  for (int64_t j = 0; j < width; j += kTile, b += operands * kTile, at.n += kTile) {
    at.cols = width - j;
    tile<E, kRows>(p, a, b, operands, at);
  }
}

template <class E, class T>
void product_as(const ColumnProduct& p, float* scratch, int64_t begin, int64_t end) {
  const int64_t panels = (p.m + kPanel - 1) / kPanel, deep = kDeep * E::kPer;
  float* a = scratch;
  float* b = scratch + kPanelFloats;
  while (begin < end) {  // a block of columns at a time
    const int64_t n = begin / panels * p.width, width = min_of(p.width, p.n - n);
    const int64_t first = begin % panels, last = min_of(first + (end - begin), panels);
    for (int64_t k = 0; k < p.k; k += deep) {
      const int64_t depth = min_of(deep, p.k - k);
      pack_columns<T>(E{}, p, k, depth, n, width, b);
      for (int64_t i = first; i < last; ++i) {
        const int64_t m = i * kPanel, rows = min_of<int64_t>(kPanel, p.m - m);
        const Place at{m, rows, n, 0, p.add || k > 0};
        if (rows <= kPanel / 4) {
          panel_rows<E, kPanel / 4, T>(p, k, depth, at, width, b, a);
        } else if (rows <= kPanel / 2) {
          panel_rows<E, kPanel / 2, T>(p, k, depth, at, width, b, a);
        } else {
          panel_rows<E, kPanel, T>(p, k, depth, at, width, b, a);
        }
      }
    }
    begin += last - first;
  }
}

void product(const ColumnProduct& p, float* scratch, int64_t begin, int64_t end) {
  with_type(p.dtype, [&]<class T>(const T*) {
    if constexpr (kFastPairs && __is_same(T, bf16)) {
      product_as<Pairs, T>(p, scratch, begin, end);
    } else {
      product_as<Singles, T>(p, scratch, begin, end);
    }
  });
}

int64_t scratch(int64_t width) {
  return kPanelFloats + (width + kTile - 1) / kTile * kTile * kDeep;
}

FASTLM_EXPORT(LinearCrossEntropyKernels, linear_cross_entropy) = {kPanel, kTile, scratch, product};
