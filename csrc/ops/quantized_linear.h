// Contract of quantized_linear: what a kernel is given.
//
// The weight lies in panels of 16 outputs, the last one padded with zeros:
//   8 bits:  [panels][in / 4][16][4] signed bytes
//   4 bits:  [panels][in / 8][16][4] bytes, the low half of byte j value j, the high half value 4 +
//   j scale, minimum: [panels][in / group][16] fp16
#pragma once
#include "common/dtype.h"

namespace fastlm {

constexpr int64_t kQuantizedPanel = 16;  // outputs that one item of work covers
constexpr int64_t kQuantizedBlock = 32;  // values of a row of x with one scale

enum class QuantizedForm : int { kInt8, kInt4, kInt4Minimum };

// Bytes of one row of x once quantized to so many digits (1, 3 or 4); aligned to 4.
constexpr int64_t quantized_row_bytes(int64_t in, int64_t digits) {
  return in / kQuantizedBlock * (digits * (kQuantizedBlock + 4) + 8);
}

// q[r,:] = x[r,:] in fixed point. One digit: x to 8 bits, as the largest of a block asks. Three or
// four digits: to 2^-20 or 2^-27 of the largest of a block, which keeps all that matters of bf16
// (and fp16) or of fp32.
struct QuantizeRows {
  const void* x;  // [rows, in], rows dense, x_stride apart
  void* q;        // [rows][quantized_row_bytes(in, digits)]
  int64_t in, x_stride;
  int digits;
  QuantizedForm form;  // of the weight that the rows are for
  DType dtype;
};

// y[r,:] = x[r,:] w^T + bias
struct QuantizedLinearForward {
  const void* q;        // [rows][quantized_row_bytes(in, digits)]
  const void* values;   // packed, see above
  const void* scale;    // packed
  const void* minimum;  // packed, or null
  const void* bias;     // [out], or null
  void* y;              // [rows, out], rows y_stride apart
  int64_t rows, in, out, group, y_stride;
  int digits;
  QuantizedForm form;
  DType dtype;  // of bias and y
};

struct QuantizedLinearKernels {
  void (*quantize)(const QuantizeRows&, int64_t row_begin, int64_t row_end);
  void (*forward)(const QuantizedLinearForward&, int64_t panel_begin, int64_t panel_end);
};

}  // namespace fastlm
