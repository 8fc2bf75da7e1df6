// linear forward, and the products of its gradients.
// Computes   y = x w^T + bias
// Algorithm  a few rows: a panel of weight rows at a time, as they lie (cpu/gemm.h), or read along
//            the outputs where they are transposed (cpu/columns.h). Many rows: both sides packed,
//            whichever way they lie (cpu/packed_product.h).
// Tile       panel of 48 weight rows x 16 rows of x, sums in 12 KiB on the stack; transposed: 8
//            weight rows x as many outputs as have room in 32 KiB; packed: 14 x 32
// Traffic    a few rows: w once, x once, writes y; many: see cpu/packed_product.h
// Numerics   fp32 sums, one rounding; same bits for any number of threads
// Source     see cpu/gemm.h, cpu/packed_product.h
#include "cpu/gemm.h"
#include "cpu/columns.h"
#include "cpu/packed_product.h"

static_assert(kLinearFewRows <= kBlockX && kLinearFewRows <= kColumnsRows, "");

template <class T>
void forward_panels(const LinearForward& a, int64_t begin, int64_t end) {
  const T* bias = static_cast<const T*>(a.bias);
  Sums sums;
  for (int64_t p = begin; p < end; ++p) {
    const int64_t first = p * kPanel, outs = min_of<int64_t>(kPanel, a.out - first);
    const T* w = static_cast<const T*>(a.w) + first * a.w_stride_out;
    panel_product(static_cast<const T*>(a.x), a.rows, w, a.w_stride_out, outs, a.in, &sums);
    for (int64_t r = 0; r < a.rows; ++r) {
      T* y = static_cast<T*>(a.y) + r * a.out + first;
      each_vector(outs, [&](int64_t i, auto... n) {
        store(y + i, biased(sums.at + r * kPanel, bias ? bias + first : nullptr, i, n...), n...);
      });
    }
  }
}

template <class T>
void forward_columns(const LinearForward& a, int64_t begin, int64_t end) {
  alignas(64) float sums[kColumnsSums];
  const T* bias = static_cast<const T*>(a.bias);
  const int64_t last = min_of<int64_t>(end * kPanel, a.out);
  const int64_t chunk = kColumnsSums / a.rows / kLanes * kLanes;
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

// ---- many rows ----

template <class T>
bool keeps_sums(const Product& p) {
  using E = packed::Engine<T>;
  return !p.sums && p.dtype != DType::kFloat32 && packed::depth_of<E>(p.k) < p.k;
}

int64_t scratch(const Product& p) {
  return with_type(p.dtype, [&]<class T>(const T*) {
    return packed::scratch_floats<packed::Engine<T>>(p.k, keeps_sums<T>(p));
  });
}

template <class T>
void product_of(const Product& p, const Region& r, float* memory) {
  using E = packed::Engine<T>;
  const auto columns = packed::columns_of<E, T>(p.b);
  if (p.sums || p.dtype == DType::kFloat32) {
    return packed::product<E, T>(p.a, p.k, r, memory, columns, packed::ToSums<T>{p});
  }
  float* const kept = memory + packed::scratch_floats<E>(p.k, false);
  packed::in_height<E>(r, keeps_sums<T>(p), [&](const Region& part) {
    packed::product<E, T>(p.a, p.k, part, memory, columns, packed::ToRounded<T>{p, part, kept});
  });
}

void product(const Product& p, const Region& r, float* memory) {
  with_type(p.dtype, [&]<class T>(const T*) { product_of<T>(p, r, memory); });
}

FASTLM_EXPORT(LinearKernels, linear) = {kPanel,        forward, packed::Engine<bf16>::kRows,
                                        packed::kCols, scratch, product};
