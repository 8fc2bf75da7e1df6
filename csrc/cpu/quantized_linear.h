// quantized_linear forward.
// Computes   y[r, n] = sum_k x[r, k] w[n, k] + bias[n], w = values * scale + minimum by groups of k
// Algorithm  x becomes fixed point, a power of two as scale for 32 values, in digits of 7 bits. The
//            integers of the weight meet one digit at a time in the processor's byte product, which
//            is exact; the digits' sums are put together as floats once per 32 values. Bytes are
//            unsigned there: weights carry an offset, taken off again through the sums of x.
// Tile       16 outputs x up to 4 rows of x x 32 values: an accumulator per digit, row and vector
//            of outputs, no sum across lanes
// Traffic    reads the packed weight once, in order; x from L1
// Numerics   exact within 32 values but for what fixed point drops, 2^-27 of the largest of them
//            (bf16: 2^-20, with one digit: half of 1 / 127); fp32 sums over the blocks in order,
//            one rounding; same bits for any number of threads and for any grouping of rows
// Source     interleaved bytes for vpdpbusd as in llama.cpp's repack; digits: Ootomo, Ozaki,
// Yokota,
//            arXiv:2306.11975
#include "cpu/gemm.h"
constexpr int kVectors = static_cast<int>(kQuantizedPanel) / kLanes;  // of a panel's outputs
constexpr int64_t kAhead = 6144;       // bytes of values asked for ahead of their use, and
constexpr int64_t kGroupsAhead = 32;   // groups' scales; both to L2, where more may be on its way
constexpr int kTop3 = 20, kTop4 = 27;  // bits of the fixed point in three and four digits

template <QuantizedForm form>
constexpr int kOffset = form == QuantizedForm::kInt8   ? 128
                        : form == QuantizedForm::kInt4 ? 8
                                                       : 0;
template <QuantizedForm form>
constexpr int64_t kBlockBytes =
    kQuantizedPanel * kQuantizedBlock / (form == QuantizedForm::kInt8 ? 1 : 2);

// One block of a quantized row.
template <int kDigits>
struct XBlock {
  int8_t digits[kDigits][kQuantizedBlock];  // the last one is the highest
  int32_t offset[kDigits];                  // what the weight's offset adds, negated
  float scale, total;                       // total: the sum of the block as it is expressed
};

inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

template <int kDigits>
inline void quantize_block(const float* x, int offset, XBlock<kDigits>* q) {
  VecF most = zero(), sum = zero();
  for (int i = 0; i < kQuantizedBlock; i += kLanes) {
    most = vmax(most, vabs(load(x + i)));
    sum = sum + (load(x + i) - load(x + i));  // NaN where x is not finite
  }
  const float largest = reduce_max(most);
  float up;  // x * up is rounded, q * scale is x again
  if (kDigits == 1) {
    up = largest > 1e-30f ? 127.0f / largest : 0.0f;
    q->scale = largest / 127.0f;
  } else {
    constexpr uint32_t top = kDigits == 4 ? kTop4 : kTop3;
    uint32_t bits;
    memcpy(&bits, &largest, sizeof bits);
    const uint32_t exponent =
        max_of<uint32_t>(bits >> 23, 27);  // below, the scale is as for 2^-100
    up = float_of((253 + top - exponent) << 23);
    q->scale = float_of((exponent + 1 - top) << 23);
  }
  if (!(reduce_add(sum) == 0.0f)) {
    memset(q, 0, sizeof *q);
    q->scale = q->total = float_of(0x7fc00000u);
    return;
  }
  float scaled[kQuantizedBlock];
  int32_t rest[kQuantizedBlock];
  for (int i = 0; i < kQuantizedBlock; i += kLanes) {
    store(scaled + i, vround(load(x + i) * set1(up)));
  }
  for (int i = 0; i < kQuantizedBlock; ++i) rest[i] = static_cast<int32_t>(scaled[i]);
  int64_t total = 0;
  for (int d = 0; d < kDigits; ++d) {
    int32_t digits = 0;
    for (int i = 0; i < kQuantizedBlock; ++i) {
      const int32_t digit = d + 1 < kDigits ? ((rest[i] + 64) & 127) - 64 : rest[i];
      q->digits[d][i] = static_cast<int8_t>(digit);
      digits += digit;
      rest[i] = (rest[i] - digit) >> 7;
    }
    q->offset[d] = -offset * digits;
    total += static_cast<int64_t>(digits) << (7 * d);
  }
  q->total = static_cast<float>(total) * q->scale;
}

template <int kDigits, class T>
void quantize_rows(const QuantizeRows& a, int64_t begin, int64_t end) {
  const int64_t blocks = a.in / kQuantizedBlock;
  const int offset = a.form == QuantizedForm::kInt8   ? kOffset<QuantizedForm::kInt8>
                     : a.form == QuantizedForm::kInt4 ? kOffset<QuantizedForm::kInt4>
                                                      : 0;
  for (int64_t r = begin; r < end; ++r) {
    const T* x = static_cast<const T*>(a.x) + r * a.x_stride;
    XBlock<kDigits>* q = static_cast<XBlock<kDigits>*>(a.q) + r * blocks;
    for (int64_t b = 0; b < blocks; ++b) {
      float block[kQuantizedBlock];
      for (int i = 0; i < kQuantizedBlock; i += kLanes) {
        store(block + i, load(x + b * kQuantizedBlock + i));
      }
      quantize_block(block, offset, q + b);
    }
  }
}

template <class T>
void quantize_digits(const QuantizeRows& a, int64_t begin, int64_t end) {
  if (a.digits == 1) return quantize_rows<1, T>(a, begin, end);
  if (a.digits == 3) return quantize_rows<3, T>(a, begin, end);
  quantize_rows<4, T>(a, begin, end);
}

void quantize(const QuantizeRows& a, int64_t begin, int64_t end) {
  if (a.dtype == DType::kFloat32) return quantize_digits<float>(a, begin, end);
  if (a.dtype == DType::kFloat16) return quantize_digits<fp16>(a, begin, end);
  quantize_digits<bf16>(a, begin, end);
}

// acc += u . s for four bytes a lane; kSmall: the weight has 4 bits, or a digit of x 7.
template <bool kSmall>
inline VecI byte_product(VecI acc, VecI u, VecI s) {
  if constexpr (kFastBytes || kSmall) return dot4(acc, u, s);
  return dot4(dot4(acc, and_bytes(u, 127), s), and_bytes(u, 128), s);
}

// The digits' sums put together.
inline VecF compose(const VecI (&d)[1]) { return to_lanes(d[0]); }
inline VecF compose(const VecI (&d)[3]) {
  return fma(to_lanes(d[2]), set1(16384.0f), to_lanes(shift_add<7>(d[1], d[0])));
}
inline VecF compose(const VecI (&d)[4]) {
  return fma(to_lanes(shift_add<7>(d[3], d[2])), set1(16384.0f),
             to_lanes(shift_add<7>(d[1], d[0])));
}

// What four values of every output add: w[v] is a vector of outputs, x a row of the tile.
template <bool kSmall, int kDigits, int kRows, int kCount>
inline void add_quad(const VecI (&w)[kCount], const XBlock<kDigits>* const (&x)[kRows], int quad,
                     VecI (&acc)[kRows][kCount][kDigits]) {
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int d = 0; d < kDigits; ++d) {
      int32_t four;
      memcpy(&four, x[r]->digits[d] + 4 * quad, sizeof four);
      const VecI digit = set1_int(four);
#pragma GCC unroll 4
      for (int v = 0; v < kCount; ++v) {
        acc[r][v][d] = byte_product<kSmall>(acc[r][v][d], w[v], digit);
      }
    }
  }
}

// Rows of x in one tile: their accumulators fit the registers.
constexpr int rows_in_tile(int digits) {
  const int fit = (kLanes == 16 ? 16 : 8) / (kVectors * digits);
  return fit < 1 ? 1 : fit > 4 ? 4 : fit;
}

// sums[r][v] = kRows rows of x against a panel, from the first block to the last. One panel: memory
// is fastest as one stream a thread, which runs on into the next panel.
template <QuantizedForm form, int kDigits, int kRows>
void tile(const QuantizedLinearForward& a, int64_t row, int64_t panel,
          VecF (&sums)[kRows][kVectors]) {
  constexpr int kCount = kVectors;
  constexpr bool kSmall = form != QuantizedForm::kInt8 || kDigits > 1;
  const int64_t blocks = a.in / kQuantizedBlock, groups = a.in / a.group;
  // vector v of the outputs
  const uint8_t* w[kCount];
  const fp16 *scale[kCount], *minimum[kCount];
#pragma GCC unroll 4
  for (int v = 0; v < kCount; ++v) {
    const int64_t lane = v * kLanes, step = panel * groups * kQuantizedPanel + lane;
    w[v] = static_cast<const uint8_t*>(a.values) + panel * blocks * kBlockBytes<form> + 4 * lane;
    scale[v] = static_cast<const fp16*>(a.scale) + step;
    minimum[v] = static_cast<const fp16*>(a.minimum) + step;
  }
  const XBlock<kDigits>* x[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    x[r] = static_cast<const XBlock<kDigits>*>(a.q) + (row + r) * blocks;
#pragma GCC unroll 4
    for (int v = 0; v < kCount; ++v) sums[r][v] = zero();
  }
  for (int64_t g = 0; g < groups; ++g) {
    __builtin_prefetch(scale[0] + kGroupsAhead * kQuantizedPanel, 0, 2);
    if constexpr (form == QuantizedForm::kInt4Minimum) {
      __builtin_prefetch(minimum[0] + kGroupsAhead * kQuantizedPanel, 0, 2);
    }
    for (int64_t b = 0; b < a.group; b += kQuantizedBlock) {
      VecI acc[kRows][kCount][kDigits];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kCount; ++v) {
#pragma GCC unroll 4
          for (int d = 0; d < kDigits; ++d) acc[r][v][d] = set1_int(x[r]->offset[d]);
        }
      }
      constexpr int kQuads = form == QuantizedForm::kInt8 ? 1 : 2;  // in a vector of bytes
#pragma GCC unroll 8
      for (int quad = 0; quad < 8; quad += kQuads) {
        VecI low[kCount], high[kCount];
#pragma GCC unroll 4
        for (int v = 0; v < kCount; ++v) {
          __builtin_prefetch(w[v] + kAhead, 0, 2);
          const VecI bytes = load_bytes(w[v]);
          w[v] += 4 * kQuantizedPanel;
          low[v] = kQuads == 1 ? flip_bytes(bytes, 128) : and_bytes(bytes, 15);
          if constexpr (kQuads == 2) high[v] = high_nibbles(bytes);
        }
        add_quad<kSmall>(low, x, quad, acc);
        if constexpr (kQuads == 2) add_quad<kSmall>(high, x, quad + 1, acc);
      }
#pragma GCC unroll 4
      for (int v = 0; v < kCount; ++v) {
        const VecF step = load(scale[v]);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          sums[r][v] = fma(compose(acc[r][v]), step * set1(x[r]->scale), sums[r][v]);
          if constexpr (form == QuantizedForm::kInt4Minimum) {
            sums[r][v] = fma(load(minimum[v]), set1(x[r]->total), sums[r][v]);
          }
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) ++x[r];
    }
#pragma GCC unroll 4
    for (int v = 0; v < kCount; ++v) {
      scale[v] += kQuantizedPanel;
      if constexpr (form == QuantizedForm::kInt4Minimum) minimum[v] += kQuantizedPanel;
    }
  }
}

template <class T>
void store_sums(const QuantizedLinearForward& a, const VecF* sums, int64_t row, int64_t first) {
  const T* bias = static_cast<const T*>(a.bias);
  T* y = static_cast<T*>(a.y) + row * a.y_stride;
  for (int v = 0; v < kVectors; ++v, first += kLanes) {
    const int64_t left = a.out - first;
    if (left >= kLanes) {
      store(y + first, bias == nullptr ? sums[v] : sums[v] + load(bias + first));
    } else if (left > 0) {
      const int n = static_cast<int>(left);
      store(y + first, bias == nullptr ? sums[v] : sums[v] + load(bias + first, n), n);
    }
  }
}

template <QuantizedForm form, int kDigits, int kRows>
void rows_of_panel(const QuantizedLinearForward& a, int64_t row, int64_t panel) {
  for (; row + kRows <= a.rows; row += kRows) {
    VecF sums[kRows][kVectors];
    tile<form, kDigits, kRows>(a, row, panel, sums);
    for (int r = 0; r < kRows; ++r) {
      const int64_t first = panel * kQuantizedPanel;
      if (a.dtype == DType::kFloat32) {
        store_sums<float>(a, sums[r], row + r, first);
      } else if (a.dtype == DType::kBFloat16) {
        store_sums<bf16>(a, sums[r], row + r, first);
      } else {
        store_sums<fp16>(a, sums[r], row + r, first);
      }
    }
  }
  if constexpr (kRows > 1) rows_of_panel<form, kDigits, kRows - 1>(a, row, panel);
}

template <QuantizedForm form, int kDigits>
void forward_panels(const QuantizedLinearForward& a, int64_t begin, int64_t end) {
  for (; begin < end; ++begin) rows_of_panel<form, kDigits, rows_in_tile(kDigits)>(a, 0, begin);
}

template <QuantizedForm form>
void forward_digits(const QuantizedLinearForward& a, int64_t begin, int64_t end) {
  if (a.digits == 1) return forward_panels<form, 1>(a, begin, end);
  if (a.digits == 3) return forward_panels<form, 3>(a, begin, end);
  forward_panels<form, 4>(a, begin, end);
}

void forward(const QuantizedLinearForward& a, int64_t begin, int64_t end) {
  switch (a.form) {
    case QuantizedForm::kInt8:
      return forward_digits<QuantizedForm::kInt8>(a, begin, end);
    case QuantizedForm::kInt4:
      return forward_digits<QuantizedForm::kInt4>(a, begin, end);
    default:
      return forward_digits<QuantizedForm::kInt4Minimum>(a, begin, end);
  }
}

#include "cpu/quantized_product.h"

FASTLM_EXPORT(QuantizedLinearKernels, quantized_linear) = {quantize, forward, dequantize,
                                                           product,  kPanel,  kFastBytes};
