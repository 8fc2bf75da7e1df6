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

constexpr int64_t kQuantizedFewRows = 24;  // more of bf16 are multiplied as floats

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

// The weight as floats: w[n - first,:] for the outputs n of a range of panels.
struct Dequantize {
  const void* values;   // packed, see above
  const void* scale;    // packed
  const void* minimum;  // packed, or null
  void* w;              // rows of `in` values
  int64_t in, out, group, first;
  QuantizedForm form;
  DType dtype;
};

// y[r,:] = x[r,:] w^T + bias for many rows, with the weight rounded to their element type
struct QuantizedProduct {
  const void* x;     // [rows, in], fp32 or bf16
  const void* bias;  // [out], or null
  void* y;           // [rows, out]
  int64_t rows;
  Dequantize weight;  // but for w and first
};

struct QuantizedLinearKernels {
  void (*quantize)(const QuantizeRows&, int64_t row_begin, int64_t row_end);
  void (*forward)(const QuantizedLinearForward&, int64_t panel_begin, int64_t panel_end);
  void (*dequantize)(const Dequantize&, int64_t panel_begin, int64_t panel_end);
  // a block is `block` outputs, `scratch` has room for as many rows of the weight
  void (*product)(const QuantizedProduct&, void* scratch, int64_t block_begin, int64_t block_end);
  int64_t block;
  bool fast_bytes;  // whether exact `forward` is as fast as fp32's multiply-add, row for row
};

// y[r,:] = x[r,:] w^T + bias on a GPU. The weight lies by rows, as the Triton kernels read it:
//   8 bits:  signed bytes [out, in]
//   4 bits:  bytes [out, in / 2]; of a group, byte j holds value j in its low half and value
//            j + group / 2 in its high half
//   scale, minimum: [out, in / group] fp16
struct QuantizedRows {
  const void* x;       // [rows, in], rows x_stride apart
  const void* values;  // see above; starts at a multiple of 16 bytes
  const void* scale;
  const void* minimum;  // or null
  const void* bias;     // [out], or null
  void* y;              // [rows, out]
  int64_t rows, in, out, group, x_stride;
  QuantizedForm form;
  DType dtype;  // of x, bias and y
};

namespace cuda {
constexpr int64_t kQuantizedMostRows = 16;

// Launcher of csrc/cuda/quantized_linear.cu: queues one kernel on a cudaStream_t, returns a
// cudaError_t. Groups are powers of two from 32 on, rows at most kQuantizedMostRows.
int quantized_linear(const QuantizedRows& args, void* stream);
}  // namespace cuda

}  // namespace fastlm
