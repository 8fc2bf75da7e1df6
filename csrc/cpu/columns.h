// x w for a weight that lies transposed, [in, out]: the product inside linear and decode_plan.
// Computes   sums[m, n] = sum_k x[m, k] w[k, n] for some neighbouring outputs n
// Algorithm  eight rows of w at a time, each read along the outputs, against all rows of x. Eight
//            products are added up before they join the sum, and sums of 512 before they join the
//            total, which keeps its error small: among the weights of a softmax's gradient one has
//            nearly all the weight, and every later addition to it would round at its size.
// Tile       8 rows of w x as many outputs as the caller has room for x all rows of x
// Traffic    reads w once, in runs as long as the outputs are many; the sums from L1
// Numerics   fp32 sums; an output has the same bits whichever others are computed with it
// Source     the outer-product form of the BLAS's gemv for a transposed matrix
//
// Included by the kernel files after cpu/gemm.h, inside the set's namespace.

constexpr int kDeep = 8;
constexpr int64_t kColumnsRows = 16;    // most rows of x
constexpr int64_t kColumnsSums = 8192;  // most sums
constexpr int64_t kColumnsPart = 512;   // products that are summed apart

template <int kCount, class T>
inline void add_outer(const float (*x)[kDeep], int64_t rows, const T* w, int64_t ldw, int64_t width,
                      float* sums) {
  each_vector(width, [&](int64_t i, auto... n) {
    VecF weight[kCount];
#pragma GCC unroll 8
    for (int j = 0; j < kCount; ++j) {
      weight[j] = load(w + j * ldw + i, n...);
      __builtin_prefetch(w + (j + kDeep) * ldw + i, 0, 2);
    }
    for (int64_t m = 0; m < rows; ++m) {
      VecF sum = set1(x[m][0]) * weight[0];
#pragma GCC unroll 8
      for (int j = 1; j < kCount; ++j) sum = fma(set1(x[m][j]), weight[j], sum);
      store(sums + m * width + i, load(sums + m * width + i, n...) + sum, n...);
    }
  });
}

// sums [rows, width] += x [rows, :k] w[k, :width]; rows of x are ldx apart, rows of w ldw.
template <class T>
inline void add_columns(const T* x, int64_t ldx, int64_t rows, const T* w, int64_t ldw,
                        int64_t width, int64_t k, float* sums) {
  float deep[kColumnsRows][kDeep];
  for (int64_t i = 0; i < k; i += kDeep, w += kDeep * ldw) {
    const int64_t count = min_of<int64_t>(kDeep, k - i);
    for (int64_t m = 0; m < rows; ++m) {
      for (int64_t j = 0; j < count; ++j) deep[m][j] = ::fastlm::to_float(x[m * ldx + i + j]);
    }
    if (count == kDeep) {
      add_outer<kDeep>(deep, rows, w, ldw, width, sums);
      continue;
    }
    for (int64_t j = 0; j < count; ++j) {
      for (int64_t m = 0; m < rows; ++m) deep[m][0] = deep[m][j];
      add_outer<1>(deep, rows, w + j * ldw, ldw, width, sums);
    }
  }
}

// sums [rows, width] = x [rows, k] w[k, :width] for few rows of x; rows of w are ldw apart.
template <class T>
void columns_product(const T* x, int64_t rows, const T* w, int64_t ldw, int64_t width, int64_t k,
                     float* sums) {
  const int64_t count = rows * width;
  const size_t bytes = sizeof(float) * static_cast<size_t>(count);
  memset(sums, 0, bytes);
  add_columns(x, k, rows, w, ldw, width, min_of(k, kColumnsPart), sums);
  alignas(64) float part[kColumnsSums];
  for (int64_t i = kColumnsPart; i < k; i += kColumnsPart) {
    memset(part, 0, bytes);
    add_columns(x + i, k, rows, w + i * ldw, ldw, width, min_of(k - i, kColumnsPart), part);
    each_vector(count, [&](int64_t j, auto... n) {
      store(sums + j, load(sums + j, n...) + load(part + j, n...), n...);
    });
  }
}
