// quantized_linear forward.
// Computes   y[r, n] = sum_k x[r, k] w[n, k] + bias[n], w = values * scale + minimum by groups of k
// Algorithm  x becomes fixed point, a power of two as scale for 32 values, in digits of 7 bits. The
//            integers of the weight meet one digit at a time in the processor's byte product, which
//            is exact; the digits' sums are put together as floats once per 32 values. Bytes are
//            unsigned there: weights carry an offset, taken off again through the sums of x.
// Tile       16 outputs (32 or 64 for few rows) x up to 4 rows of x x 32 values: an accumulator per
//            digit, row and vector of outputs, no sum across lanes
// Traffic    reads the packed weight once, in order; x from L1
// Numerics   exact within 32 values but for what fixed point drops, 2^-27 of the largest of them
//            (bf16: 2^-20, with one digit: half of 1 / 127); fp32 sums over the blocks in order,
//            one rounding; same bits for any number of threads and for any grouping of rows
// Source     interleaved bytes for vpdpbusd as in llama.cpp's repack; digits: Ootomo, Ozaki,
// Yokota,
//            arXiv:2306.11975
constexpr int kVectors = static_cast<int>(kQuantizedPanel) / kLanes;  // of a panel's outputs
constexpr int64_t kAhead = 1024;       // bytes of weights asked for ahead of their use
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

// What four values of every output add, for all rows of the tile.
template <bool kSmall, int kDigits, int kRows>
inline void add_quad(VecI w, const XBlock<kDigits>* const* x, int quad, VecI (*acc)[kDigits]) {
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int d = 0; d < kDigits; ++d) {
      int32_t four;
      memcpy(&four, x[r]->digits[d] + 4 * quad, sizeof four);
      acc[r][d] = byte_product<kSmall>(acc[r][d], w, set1_int(four));
    }
  }
}

// kRows rows of x against kPanels panels, from the first block to the last.
template <QuantizedForm form, int kDigits, int kRows, int kPanels>
void tile(const QuantizedLinearForward& a, int64_t row, int64_t panel, VecF (*sums)[kRows]) {
  constexpr int kCount = kPanels * kVectors, kFour = 4 * kLanes;
  constexpr bool kSmall = form != QuantizedForm::kInt8 || kDigits > 1;
  const int64_t blocks = a.in / kQuantizedBlock, groups = a.in / a.group;
  const uint8_t* w[kPanels];
  const fp16 *scale[kPanels], *minimum[kPanels];
#pragma GCC unroll 4
  for (int p = 0; p < kPanels; ++p) {
    w[p] = static_cast<const uint8_t*>(a.values) + (panel + p) * blocks * kBlockBytes<form>;
    scale[p] = static_cast<const fp16*>(a.scale) + (panel + p) * groups * kQuantizedPanel;
    minimum[p] = static_cast<const fp16*>(a.minimum) + (panel + p) * groups * kQuantizedPanel;
  }
  const XBlock<kDigits>* x[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    x[r] = static_cast<const XBlock<kDigits>*>(a.q) + (row + r) * blocks;
#pragma GCC unroll 4
    for (int v = 0; v < kCount; ++v) sums[v][r] = zero();
  }
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t b = 0; b < a.group; b += kQuantizedBlock) {
#pragma GCC unroll 4
      for (int v = 0; v < kCount; ++v) {
        const int p = v / kVectors, lane = v % kVectors * kLanes;
        const uint8_t* from = w[p] + v % kVectors * kFour;
        VecI acc[kRows][kDigits];
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
          for (int d = 0; d < kDigits; ++d) acc[r][d] = set1_int(x[r]->offset[d]);
        }
        if constexpr (form == QuantizedForm::kInt8) {
#pragma GCC unroll 8
          for (int quad = 0; quad < 8; ++quad, from += 4 * kQuantizedPanel) {
            __builtin_prefetch(from + kAhead, 0, 3);
            add_quad<kSmall, kDigits, kRows>(flip_bytes(load_bytes(from), 128), x, quad, acc);
          }
        } else {
#pragma GCC unroll 4
          for (int quad = 0; quad < 8; quad += 2, from += 4 * kQuantizedPanel) {
            __builtin_prefetch(from + kAhead, 0, 3);
            const VecI both = load_bytes(from);
            add_quad<kSmall, kDigits, kRows>(and_bytes(both, 15), x, quad, acc);
            add_quad<kSmall, kDigits, kRows>(high_nibbles(both), x, quad + 1, acc);
          }
        }
        const VecF step = load(scale[p] + lane);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          sums[v][r] = fma(compose(acc[r]), step * set1(x[r]->scale), sums[v][r]);
          if constexpr (form == QuantizedForm::kInt4Minimum) {
            sums[v][r] = fma(load(minimum[p] + lane), set1(x[r]->total), sums[v][r]);
          }
        }
      }
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; ++p) w[p] += kBlockBytes<form>;
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) ++x[r];
    }
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p) {
      scale[p] += kQuantizedPanel;
      if constexpr (form == QuantizedForm::kInt4Minimum) minimum[p] += kQuantizedPanel;
    }
  }
}

template <QuantizedForm form, int kDigits, int kRows, int kPanels, class T>
void tile_to_y(const QuantizedLinearForward& a, int64_t row, int64_t panel) {
  VecF sums[kPanels * kVectors][kRows];
  tile<form, kDigits, kRows, kPanels>(a, row, panel, sums);
  const T* bias = static_cast<const T*>(a.bias);
#pragma GCC unroll 4
  for (int v = 0; v < kPanels * kVectors; ++v) {
    const int64_t n = panel * kQuantizedPanel + v * kLanes, left = a.out - n;
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      T* y = static_cast<T*>(a.y) + (row + r) * a.y_stride + n;
      if (left >= kLanes) {
        store(y, bias == nullptr ? sums[v][r] : sums[v][r] + load(bias + n));
      } else if (left > 0) {
        const int lanes = static_cast<int>(left);
        store(y, bias == nullptr ? sums[v][r] : sums[v][r] + load(bias + n, lanes), lanes);
      }
    }
  }
}

template <QuantizedForm form, int kDigits, class T>
void forward_panels(const QuantizedLinearForward& a, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel) {
    int64_t row = 0;
    for (; row + 4 <= a.rows; row += 4) tile_to_y<form, kDigits, 4, 1, T>(a, row, panel);
    for (; row < a.rows; ++row) tile_to_y<form, kDigits, 1, 1, T>(a, row, panel);
  }
}

template <QuantizedForm form, int kDigits>
void forward_typed(const QuantizedLinearForward& a, int64_t begin, int64_t end) {
  if (a.dtype == DType::kFloat32) return forward_panels<form, kDigits, float>(a, begin, end);
  if (a.dtype == DType::kFloat16) return forward_panels<form, kDigits, fp16>(a, begin, end);
  forward_panels<form, kDigits, bf16>(a, begin, end);
}

template <QuantizedForm form>
void forward_digits(const QuantizedLinearForward& a, int64_t begin, int64_t end) {
  if (a.digits == 1) return forward_typed<form, 1>(a, begin, end);
  if (a.digits == 3) return forward_typed<form, 3>(a, begin, end);
  forward_typed<form, 4>(a, begin, end);
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

FASTLM_EXPORT(QuantizedLinearKernels, quantized_linear) = {quantize, forward};
