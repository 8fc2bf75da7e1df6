// x w for a weight that lies transposed, [in, out]: the product inside linear and decode_plan.
// Computes   sums[m, n] = sum_k x[m, k] w[k, n] for some neighbouring outputs n
// Algorithm  eight rows of w at a time, each read along the outputs, against all rows of x. Eight
//            products are added up before they join the sum, which keeps its error small.
// Tile       8 rows of w x as many outputs as the caller has room for x all rows of x
// Traffic    reads w once, in runs as long as the outputs are many; the sums from L1
// Numerics   fp32 sums; an output has the same bits whichever others are computed with it
// Source     the outer-product form of the BLAS's gemv for a transposed matrix
//
// Included by the kernel files after cpu/gemm.h, inside the set's namespace.

constexpr int kDeep = 8;
constexpr int64_t kColumnsRows = 16;  // most rows of x

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

// sums [rows, width] = x [rows, k] w[k, :width] for few rows of x; rows of w are ldw apart.
template <class T>
void columns_product(const T* x, int64_t rows, const T* w, int64_t ldw, int64_t width, int64_t k,
                     float* sums) {
  float deep[kColumnsRows][kDeep];
  memset(sums, 0, sizeof(float) * static_cast<size_t>(rows * width));
  for (int64_t i = 0; i < k; i += kDeep, w += kDeep * ldw) {
    const int64_t count = min_of<int64_t>(kDeep, k - i);
    for (int64_t m = 0; m < rows; ++m) {
      for (int64_t j = 0; j < count; ++j) deep[m][j] = ::fastlm::to_float(x[m * k + i + j]);
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
