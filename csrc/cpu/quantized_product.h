// quantized_linear for many rows: the weight as floats, a block of outputs at a time, against the
// tiles of cpu/gemm.h; and the whole weight as floats.
//
// Included by cpu/quantized_linear.h.

// w [16][in] for one panel: kLanes outputs and as many values of k at a time, turned over.
template <QuantizedForm form, class T>
void dequantize_panel(const Dequantize& a, int64_t panel, T* w) {
  const int64_t groups = a.in / a.group, outputs = a.out - panel * kQuantizedPanel;
  const uint8_t* values =
      static_cast<const uint8_t*>(a.values) + panel * (a.in / kQuantizedBlock) * kBlockBytes<form>;
  const fp16* scales = static_cast<const fp16*>(a.scale) + panel * groups * kQuantizedPanel;
  const fp16* minima = static_cast<const fp16*>(a.minimum) + panel * groups * kQuantizedPanel;
  constexpr int64_t kDeep = kLanes < 8 ? 8 : kLanes;  // values of k at a time
  constexpr bool kBytes = form == QuantizedForm::kInt8;
  for (int v = 0; v < kVectors; ++v) {
    const int64_t first = v * kLanes, rows = min_of<int64_t>(kLanes, outputs - first);
    const uint8_t* from = values + 4 * first;
    for (int64_t k = 0; k < a.in; k += kDeep) {
      const int64_t g = k / a.group * kQuantizedPanel + first;
      const VecF scale = load(scales + g);
      const VecF origin = form == QuantizedForm::kInt4Minimum
                              ? load(minima + g)
                              : scale * set1(-static_cast<float>(kOffset<form>));
      VecF columns[kDeep];
      for (int64_t i = 0; i < kDeep; i += kBytes ? 4 : 8, from += 4 * kQuantizedPanel) {
        const VecI bytes = load_bytes(from);
        const VecI low = kBytes ? flip_bytes(bytes, 128) : and_bytes(bytes, 15);
        columns[i] = fma(to_lanes(byte_of<0>(low)), scale, origin);
        columns[i + 1] = fma(to_lanes(byte_of<1>(low)), scale, origin);
        columns[i + 2] = fma(to_lanes(byte_of<2>(low)), scale, origin);
        columns[i + 3] = fma(to_lanes(byte_of<3>(low)), scale, origin);
        if constexpr (!kBytes) {
          const VecI high = high_nibbles(bytes);
          columns[i + 4] = fma(to_lanes(byte_of<0>(high)), scale, origin);
          columns[i + 5] = fma(to_lanes(byte_of<1>(high)), scale, origin);
          columns[i + 6] = fma(to_lanes(byte_of<2>(high)), scale, origin);
          columns[i + 7] = fma(to_lanes(byte_of<3>(high)), scale, origin);
        }
      }
      for (int64_t i = 0; i < kDeep; i += kLanes) {
        VecF square[kLanes];
        for (int j = 0; j < kLanes; ++j) square[j] = columns[i + j];
        transpose(square);
        for (int64_t r = 0; r < rows; ++r) store(w + (first + r) * a.in + k + i, square[r]);
      }
    }
  }
}

template <QuantizedForm form, class T>
void dequantize_panels(const Dequantize& a, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel) {
    dequantize_panel<form>(a, panel,
                           static_cast<T*>(a.w) + (panel * kQuantizedPanel - a.first) * a.in);
  }
}

template <class T>
void dequantize_form(const Dequantize& a, int64_t begin, int64_t end) {
  switch (a.form) {
    case QuantizedForm::kInt8:
      return dequantize_panels<QuantizedForm::kInt8, T>(a, begin, end);
    case QuantizedForm::kInt4:
      return dequantize_panels<QuantizedForm::kInt4, T>(a, begin, end);
    default:
      return dequantize_panels<QuantizedForm::kInt4Minimum, T>(a, begin, end);
  }
}

void dequantize(const Dequantize& a, int64_t begin, int64_t end) {
  if (a.dtype == DType::kFloat32) return dequantize_form<float>(a, begin, end);
  if (a.dtype == DType::kFloat16) return dequantize_form<fp16>(a, begin, end);
  dequantize_form<bf16>(a, begin, end);
}

template <class T>
void product_blocks(const QuantizedProduct& a, void* scratch, int64_t begin, int64_t end) {
  static_assert(kPanel % kQuantizedPanel == 0, "a block is whole panels");
  constexpr int64_t kShare = kPanel / kQuantizedPanel;
  Dequantize weight = a.weight;
  weight.w = scratch;
  const int64_t in = weight.in, out = weight.out;
  const int64_t panels = (out + kQuantizedPanel - 1) / kQuantizedPanel;
  const T *x = static_cast<const T*>(a.x), *bias = static_cast<const T*>(a.bias);
  Sums sums;
  for (int64_t b = begin; b < end; ++b) {
    const int64_t first = b * kPanel, width = min_of<int64_t>(kPanel, out - first);
    weight.first = first;
    dequantize_form<T>(weight, b * kShare, min_of<int64_t>((b + 1) * kShare, panels));
    for (int64_t m = 0; m < a.rows; m += kBlockX) {
      const int64_t rows = min_of<int64_t>(kBlockX, a.rows - m);
      panel_product(x + m * in, rows, static_cast<const T*>(scratch), in, width, in, &sums);
      for (int64_t r = 0; r < rows; ++r) {
        T* y = static_cast<T*>(a.y) + (m + r) * out + first;
        each_vector(width, [&](int64_t i, auto... n) {
          store(y + i, biased(sums.at + r * kPanel, bias ? bias + first : nullptr, i, n...), n...);
        });
      }
    }
  }
}

void product(const QuantizedProduct& a, void* scratch, int64_t begin, int64_t end) {
  if (a.weight.dtype == DType::kFloat32) return product_blocks<float>(a, scratch, begin, end);
  product_blocks<bf16>(a, scratch, begin, end);
}
