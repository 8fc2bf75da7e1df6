// Calls representative kernels of the AVX2 set once each, for tools/instructions.py to count their
// instructions: no PyTorch, no threads, fixed numbers.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "ops/activation.h"
#include "ops/attention.h"
#include "ops/cross_entropy.h"
#include "ops/decode_attention.h"
#include "ops/layer_norm.h"
#include "ops/linear.h"
#include "ops/rms_norm.h"
#include "ops/rope.h"

namespace fastlm::avx2 {
extern const NormKernels rms_norm;
extern const NormKernels layer_norm;
extern const ActivationKernels activation;
extern const RopeKernels rope;
extern const AttentionKernels attention;
extern const DecodeAttentionKernels decode_attention;
extern const LinearKernels linear;
extern const CrossEntropyKernels cross_entropy;
}  // namespace fastlm::avx2

namespace {

using namespace fastlm;
constexpr DType kType = DType::kFloat32;

// Numbers between -1 and 1, aligned to 64 bytes.
float* numbers(int64_t count) {
  void* memory = std::aligned_alloc(64, static_cast<size_t>((count * 4 + 127) / 64 * 64));
  float* p = static_cast<float*>(memory);
  uint32_t state = 1;
  for (int64_t i = 0; i < count; ++i) {
    state = state * 1664525u + 1013904223u;
    p[i] = static_cast<float>(static_cast<int32_t>(state)) * 0x1p-31f;
  }
  return p;
}

HeadRows heads(float* data, int64_t tokens, int64_t size) { return {data, 0, tokens * size, size}; }

}  // namespace

#define MEASURED extern "C" [[gnu::noinline]] void

MEASURED measured_rms_norm_forward(const NormForward& args) {
  avx2::rms_norm.forward(args, 0, args.rows);
}
MEASURED measured_rms_norm_backward(const NormBackward& args) {
  avx2::rms_norm.backward(args, 0, args.blocks);
}
MEASURED measured_layer_norm_forward(const NormForward& args) {
  avx2::layer_norm.forward(args, 0, args.rows);
}
MEASURED measured_gated_silu(const ActivationForward& args) {
  avx2::activation.forward(args, 0, args.rows, 0, args.cols);
}
MEASURED measured_gelu_backward(const ActivationBackward& args) {
  avx2::activation.backward(args, 0, args.rows, 0, args.cols);
}
MEASURED measured_rope(const RopeArgs& args) {
  avx2::rope.rotate(args, 0,
                    args.heads / args.head_block * (args.tokens / args.token_block) * args.batch);
}
MEASURED measured_attention_forward(const AttentionForward& args, float* scratch) {
  for (int64_t task = 0; task < args.a.kv_heads; ++task) {
    avx2::attention.forward(args, task, scratch);
  }
}
MEASURED measured_attention_backward(const AttentionBackward& args, float* scratch) {
  for (int64_t task = 0; task < args.a.kv_heads; ++task) {
    avx2::attention.backward(args, task, scratch);
  }
}
MEASURED measured_decode_attention(const DecodeAttentionArgs& args, int64_t tasks) {
  avx2::decode_attention.attend(args, 0, tasks);
}
MEASURED measured_linear_one_row(const LinearForward& args) {
  avx2::linear.forward(args, 0, args.out / avx2::linear.panel);
}
MEASURED measured_linear_many_rows(const LinearForward& args) {
  avx2::linear.forward(args, 0, args.out / avx2::linear.panel);
}
MEASURED measured_cross_entropy(const CrossEntropy& args, float* scratch) {
  avx2::cross_entropy.rows(args, scratch, 0, args.rows);
}

int main() {
  constexpr int64_t kRows = 16, kCols = 768;
  float *x = numbers(kRows * kCols), *weight = numbers(kCols), *y = numbers(kRows * kCols);
  const NormForward norm{x, nullptr, weight, y, nullptr, kRows, kCols, 1e-6f, 0.0f, kType, kType};
  measured_rms_norm_forward(norm);
  measured_layer_norm_forward(norm);
  NormBackward slope{};
  slope.grad = y, slope.x = x, slope.weight = weight, slope.dx = numbers(kRows * kCols);
  slope.dweight_blocks = numbers(kCols);
  slope.rows = kRows, slope.cols = kCols, slope.blocks = 1, slope.eps = 1e-6f;
  slope.dtype = slope.weight_dtype = kType;
  measured_rms_norm_backward(slope);

  float* up = numbers(kRows * kCols);
  measured_gated_silu({x, up, y, kRows, kCols, kCols, kCols, Activation::kSilu, kType});
  measured_gelu_backward({y, x, nullptr, up, nullptr, kRows, kCols, kCols, kCols, kCols, kCols,
                          Activation::kGelu, kType});

  constexpr int64_t kHeads = 4, kTokens = 128, kSize = 64;
  const int64_t each = kHeads * kTokens * kSize;
  float *q = numbers(each), *k = numbers(each), *v = numbers(each), *out = numbers(each);
  float* tables = numbers(kTokens * kSize / 2);
  RopeArgs turn{};
  turn.x = q, turn.y = out;
  turn.x_batch = turn.y_batch = each, turn.x_head = turn.y_head = kTokens * kSize;
  turn.x_token = turn.y_token = kSize;
  turn.cos = turn.sin = tables, turn.cos_token = turn.sin_token = kSize / 2;
  turn.batch = 1, turn.heads = turn.head_block = kHeads, turn.tokens = kTokens;
  turn.token_block = 32, turn.head_dim = turn.rotary = kSize;
  turn.dtype = turn.table_dtype = kType;
  measured_rope(turn);

  AttentionForward attend{};
  Attention& a = attend.a;
  a.q = heads(q, kTokens, kSize), a.k = heads(k, kTokens, kSize), a.v = heads(v, kTokens, kSize);
  a.batch = 1, a.heads = a.kv_heads = kHeads, a.tq = a.tk = kTokens, a.d = a.dv = kSize;
  a.scale = 0.125f, a.causal = true, a.dtype = kType;
  a.lse_head = kTokens, a.lse_batch = a.lse_size = kHeads * kTokens;
  attend.out = heads(out, kTokens, kSize);
  attend.lse = numbers(2 * a.lse_size);
  attend.blocks_per_task = attention_blocks(kTokens);
  measured_attention_forward(attend, numbers(avx2::attention.forward_scratch(attend)));
  AttentionBackward back{};
  back.a = a, back.out = attend.out, back.lse = attend.lse;
  back.grad = heads(numbers(each), kTokens, kSize);
  back.dq = heads(numbers(each), kTokens, kSize), back.dk = heads(numbers(each), kTokens, kSize);
  back.dv = heads(numbers(each), kTokens, kSize);
  back.blocks_per_task = attend.blocks_per_task;
  measured_attention_backward(back, numbers(avx2::attention.backward_scratch(back)));

  const int64_t length = kTokens, first_key = 0;
  const int64_t first_task[] = {0, kHeads};
  DecodeAttentionArgs one{};
  one.q = q, one.k = k, one.v = v, one.out = out;
  one.q_batch = one.out_batch = each, one.q_head = one.out_head = kTokens * kSize;
  one.k_batch = one.v_batch = each, one.k_head = one.v_head = kTokens * kSize;
  one.q_row = one.k_row = one.v_row = one.out_row = kSize;
  one.batch = one.queries = 1, one.heads = one.kv_heads = kHeads;
  one.head_dim = one.value_dim = kSize;
  one.lengths = &length, one.first_key = &first_key, one.first_task = first_task;
  one.scale = 0.125f, one.dtype = kType;
  measured_decode_attention(one, kHeads);

  constexpr int64_t kOut = 960;
  float* w = numbers(kOut * kCols);
  LinearForward product{x, w, nullptr, numbers(64 * kOut), 1, kCols, kOut, kCols, 1, kType};
  measured_linear_one_row(product);
  product.rows = 64, product.x = numbers(64 * kCols);
  measured_linear_many_rows(product);

  constexpr int64_t kClasses = 4096;
  const std::vector<int64_t> target(kRows, 7);
  std::vector<float> loss(kRows);
  CrossEntropy entropy{};
  entropy.logits = numbers(kRows * kClasses), entropy.grad = numbers(kRows * kClasses);
  entropy.target = target.data(), entropy.loss = loss.data();
  entropy.rows = kRows, entropy.classes = kClasses, entropy.ignore_index = -100;
  entropy.factor = 1.0f, entropy.class_weight_sum = kClasses, entropy.dtype = kType;
  measured_cross_entropy(entropy, numbers(cross_entropy_scratch(kClasses)));
  std::printf("%g %g\n", static_cast<double>(out[0]), static_cast<double>(loss[0]));
  return 0;
}
