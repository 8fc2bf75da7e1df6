// linear forward.
// Computes   y = x w^T + bias
// Algorithm  a panel of weight rows at a time against 64 rows of x (cpu/gemm.h), then the bias and
//            the rounding; x is taken in blocks of half a megabyte that stay in L2 while all the
//            panels pass by. A transposed weight is read along the outputs instead.
// Tile       panel of 48 weight rows x 64 rows of x, sums in 12 KiB on the stack; transposed: 8
//            weight rows x as many outputs as have room in 32 KiB
// Traffic    reads w once per block of x, so once for few rows; x once; writes y
// Numerics   fp32 sums, one rounding; same bits for any number of threads
// Source     see cpu/gemm.h
#include "cpu/gemm.h"
#include "cpu/columns.h"

template <class T>
void forward_panels(const LinearForward& a, int64_t begin, int64_t end) {
  const T* bias = static_cast<const T*>(a.bias);
  Sums sums;
  // rows of x that stay in L2 while the panels pass by
  const int64_t bytes = static_cast<int64_t>(sizeof(T)) * max_of<int64_t>(a.in, 1);
  const int64_t stay = max_of<int64_t>((1 << 19) / bytes / kBlockX, 1) * kBlockX;
  for (int64_t top = 0; top < a.rows; top += stay) {
    const int64_t bottom = min_of<int64_t>(top + stay, a.rows);
    for (int64_t p = begin; p < end; ++p) {
      const int64_t first = p * kPanel, rows_w = min_of<int64_t>(kPanel, a.out - first);
      const T* w = static_cast<const T*>(a.w) + first * a.w_stride_out;
      for (int64_t m = top; m < bottom; m += kBlockX) {
        const int64_t rows = min_of<int64_t>(kBlockX, bottom - m);
        panel_product(static_cast<const T*>(a.x) + m * a.in, rows, w, a.w_stride_out, rows_w, a.in,
                      &sums);
        for (int64_t r = 0; r < rows; ++r) {
          T* y = static_cast<T*>(a.y) + (m + r) * a.out + first;
          each_vector(rows_w, [&](int64_t i, auto... n) {
            store(y + i, biased(sums.at + r * kPanel, bias ? bias + first : nullptr, i, n...),
                  n...);
          });
        }
      }
    }
  }
}

static_assert(kLinearFewRows <= kColumnsRows, "");

template <class T>
void forward_columns(const LinearForward& a, int64_t begin, int64_t end) {
  constexpr int64_t kSums = 8192;
  alignas(64) float sums[kSums];
  const T* bias = static_cast<const T*>(a.bias);
  const int64_t last = min_of<int64_t>(end * kPanel, a.out);
  const int64_t chunk = kSums / a.rows / kLanes * kLanes;
  for (int64_t first = begin * kPanel; first < last; first += chunk) {
    const int64_t width = min_of<int64_t>(chunk, last - first);
    columns_product(static_cast<const T*>(a.x), a.rows,
                    static_cast<const T*>(a.w) + first * a.w_stride_out, a.w_stride_in, width, a.in,
                    sums);
    for (int64_t m = 0; m < a.rows; ++m) {
      T* y = static_cast<T*>(a.y) + m * a.out + first;
      each_vector(width, [&](int64_t i, auto... n) {
        store(y + i, biased(sums + m * width, bias ? bias + first : nullptr, i, n...), n...);
      });
    }
  }
}

template <class T>
void forward_any(const LinearForward& a, int64_t begin, int64_t end) {
  if (a.w_stride_in == 1) return forward_panels<T>(a, begin, end);
  forward_columns<T>(a, begin, end);
}

void forward(const LinearForward& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&]<class T>(const T*) { forward_any<T>(a, begin, end); });
}

// Blocks of 16 x 16: both sides move in whole cache lines.
template <class T>
void transpose_rows(const Transpose& a, int64_t begin, int64_t end) {
  constexpr int64_t kSide = 16;
  const T* from = static_cast<const T*>(a.from);
  T* to = static_cast<T*>(a.to);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t r0 = block * kSide, r1 = min_of<int64_t>(r0 + kSide, a.rows);
    for (int64_t c0 = 0; c0 < a.cols; c0 += kSide) {
      const int64_t c1 = min_of<int64_t>(c0 + kSide, a.cols);
      for (int64_t r = r0; r < r1; ++r) {
        for (int64_t c = c0; c < c1; ++c) to[r * a.cols + c] = from[c * a.ld + r];
      }
    }
  }
}

void transpose(const Transpose& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&]<class T>(const T*) { transpose_rows<T>(a, begin, end); });
}

FASTLM_EXPORT(LinearKernels, linear) = {kPanel, forward, transpose};
