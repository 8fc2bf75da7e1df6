// Runs the CPU kernels on what stdin brings and writes what they return to stdout, so that a test
// can judge kernels of a processor that PyTorch is not there for: tests/test_arm.py.
//
// A request is a name and then whatever that case reads, in its order: numbers of 8 bytes, arrays
// as a number of bytes and the bytes. Little-endian both ways. The answer is arrays in the same
// form. The kernels are called as the bindings call them, on one thread.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <string>
#include <vector>

#include "ops/activation.h"
#include "ops/attention.h"
#include "ops/convert.h"
#include "ops/cross_entropy.h"
#include "ops/decode_attention.h"
#include "ops/decode_plan.h"
#include "ops/feed_forward.h"
#include "ops/layer_norm.h"
#include "ops/linear.h"
#include "ops/quantized_linear.h"
#include "ops/rms_norm.h"
#include "ops/rope.h"
#include "ops/rope_append.h"
#include "ops/sample.h"
#include "cpu/isa.h"

FASTLM_KERNEL_TABLE(ActivationKernels, activation)
FASTLM_KERNEL_TABLE(AttentionKernels, attention)
FASTLM_KERNEL_TABLE(CrossEntropyKernels, cross_entropy)
FASTLM_KERNEL_TABLE(DecodeAttentionKernels, decode_attention)
FASTLM_KERNEL_TABLE(DecodePlanKernels, decode_plan)
FASTLM_KERNEL_TABLE(FeedForwardKernels, feed_forward)
FASTLM_KERNEL_TABLE(LayerNormKernels, layer_norm)
FASTLM_KERNEL_TABLE(LinearKernels, linear)
FASTLM_KERNEL_TABLE(QuantizedLinearKernels, quantized_linear)
FASTLM_KERNEL_TABLE(RmsNormKernels, rms_norm)
FASTLM_KERNEL_TABLE(RopeKernels, rope)
FASTLM_KERNEL_TABLE(RopeAppendKernels, rope_append)
FASTLM_KERNEL_TABLE(SampleKernels, sample)
namespace fastlm::baseline {
extern const ConvertKernels convert;
}

namespace {
using namespace fastlm;

[[noreturn]] void die(const std::string& why) {
  std::fprintf(stderr, "driver: %s\n", why.c_str());
  std::exit(1);
}

// Memory that lives until the answer is written, 64-byte aligned.
std::deque<void*> owned;
void* fresh(size_t bytes) {
  void* p = std::aligned_alloc(64, (bytes + 127) / 64 * 64);
  std::memset(p, 0xff, bytes);  // NaN: what a kernel leaves out shows
  owned.push_back(p);
  return p;
}
template <class T>
T* fresh_of(int64_t count) {
  return static_cast<T*>(fresh(static_cast<size_t>(count) * sizeof(T)));
}

void read(void* to, size_t bytes) {
  if (std::fread(to, 1, bytes, stdin) != bytes) die("the request ends early");
}
int64_t number() {
  int64_t n;
  read(&n, sizeof n);
  return n;
}
float real() {
  double x;
  read(&x, sizeof x);
  return static_cast<float>(x);
}
struct Array {
  void* data;  // null where it is empty
  int64_t bytes;
  operator const void*() const { return data; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};
Array array() {
  const int64_t bytes = number();
  if (bytes == 0) return {nullptr, 0};
  Array a{fresh(static_cast<size_t>(bytes)), bytes};
  read(a.data, static_cast<size_t>(bytes));
  return a;
}
void answer(const void* data, int64_t bytes) {
  std::fwrite(&bytes, sizeof bytes, 1, stdout);
  std::fwrite(data, 1, static_cast<size_t>(bytes), stdout);
}
Array result(int64_t bytes) { return {fresh(static_cast<size_t>(bytes)), bytes}; }
void answer(const Array& a) { answer(a.data, a.bytes); }

DType element() { return static_cast<DType>(number()); }

void convert() {
  const DType dtype = element();
  const bool widen = number() != 0;
  const int64_t step = number();
  const Array from = array();
  const int64_t count = from.bytes / (widen ? 2 : 4);
  const Array to = result(count * (widen ? 4 : 2));
  baseline::convert.run({from, to.data, count, step, dtype, widen});
  answer(to);
}

template <class Kernels>
void norm(const Kernels& kernels) {
  const DType dtype = element();
  const int64_t rows = number(), cols = number();
  const float eps = real();
  const Array x = array(), residual = array(), weight = array(), bias = array(), grad = array();
  const Array y = result(x.bytes), sum = result(x.bytes), dx = result(x.bytes);
  kernels.forward(
      {x, residual, weight, y.data, sum.data, rows, cols, eps, 0.0f, dtype, dtype, bias}, 0, rows);
  float* dw = fresh_of<float>(cols);
  float* db = bias.data == nullptr ? nullptr : fresh_of<float>(cols);
  kernels.backward(
      {grad, nullptr, sum, weight, dx.data, dw, rows, cols, 1, eps, 0.0f, dtype, dtype, db}, 0, 1);
  answer(y);
  answer(dx);
  answer(dw, cols * 4);
  if (db != nullptr) answer(db, cols * 4);
}

void rope() {
  const DType dtype = element();
  const int64_t heads = number(), tokens = number(), size = number();
  const bool interleaved = number() != 0, transposed = number() != 0;
  const Array x = array(), cos = array(), sin = array();
  const Array y = result(x.bytes);
  RopeArgs a{};
  a.x = x;
  a.y = y.data;
  a.x_batch = a.y_batch = heads * tokens * size;
  a.x_head = a.y_head = tokens * size;
  a.x_token = a.y_token = size;
  a.cos = cos;
  a.sin = sin;
  a.cos_token = a.sin_token = size / 2;
  a.batch = 1;
  a.heads = a.head_block = heads;
  a.tokens = a.token_block = tokens;
  a.head_dim = a.rotary = size;
  a.interleaved = interleaved;
  a.transposed = transposed;
  a.dtype = dtype;
  a.table_dtype = DType::kFloat32;
  rope_kernels().rotate(a, 0, 1);
  answer(y);
}

void rope_append() {
  RopeAppendArgs a{};
  a.dtype = element();
  a.batch = 1;
  a.heads = number();
  a.kv_heads = number();
  a.tokens = number();
  a.head_dim = a.value_dim = a.rotary = number();
  a.page_size = a.places = number();
  a.length = number();
  const Array q = array(), k = array(), v = array(), cos = array(), sin = array();
  const Array k_cache = array(), v_cache = array(), weight = array(), out = result(q.bytes);
  a.q = q, a.k = k, a.v = v, a.cos = cos, a.sin = sin;
  a.q_weight = a.k_weight = weight;
  a.out = out.data, a.k_cache = k_cache.data, a.v_cache = v_cache.data;
  a.q_head = a.out_head = a.k_head = a.v_head = a.tokens * a.head_dim;
  a.q_token = a.out_token = a.k_token = a.v_token = a.head_dim;
  a.k_cache_head = a.v_cache_head = a.page_size * a.head_dim;
  a.k_cache_token = a.v_cache_token = a.head_dim;
  a.cos_row = a.sin_row = a.rotary / 2;
  a.pages = 1;
  a.eps = 1e-6f;
  a.weight_dtype = a.dtype;
  rope_append_kernels().append(a, 0, a.tokens);
  for (const Array& made : {out, k_cache, v_cache}) answer(made);
}

void activation() {
  const DType dtype = element();
  const auto act = static_cast<Activation>(number());
  const int64_t count = number();
  const Array x = array(), up = array(), grad = array();
  const Array y = result(x.bytes), dx = result(x.bytes), dup = result(x.bytes);
  const auto& kernels = activation_kernels();
  kernels.forward({x, up, y.data, 1, count, count, count, act, dtype}, 0, 1, 0, count);
  kernels.backward(
      {grad, x, up, dx.data, dup.data, 1, count, count, count, count, count, act, dtype}, 0, 1, 0,
      count);
  answer(y);
  answer(dx);
  if (up.data != nullptr) answer(dup);
}

void linear() {
  const DType dtype = element();
  const int64_t rows = number(), in = number(), out = number();
  const bool transposed = number() != 0;  // the weight comes as [in, out]
  const Array x = array(), w = array(), bias = array();
  const Array y = result(x.bytes / in * out);
  const auto& kernels = linear_kernels();
  kernels.forward(
      {x, w, bias, y.data, rows, in, out, transposed ? 1 : in, transposed ? out : 1, dtype}, 0,
      (out + kernels.panel - 1) / kernels.panel);
  answer(y);
}

void feed_forward() {
  const DType dtype = element();
  const auto act = static_cast<Activation>(number());
  const int64_t rows = number(), in = number(), out = number();
  const Array x = array(), w_in = array(), w_gate = array(), grad = array();
  const Array hidden = result(grad.bytes), up = result(grad.bytes), gate = result(grad.bytes);
  const auto& kernels = feed_forward_kernels();
  const auto along = [&](const Array& a) { return Operand{a, in, 1}; };
  const FeedForwardHidden a{along(x),    along(w_in), along(w_gate), nullptr, nullptr,
                            hidden.data, up.data,     gate.data,     rows,    in,
                            out,         act,         dtype};
  if (rows <= kLinearFewRows) {
    kernels.hidden(a, 0, (out + kernels.panel - 1) / kernels.panel);
  } else {
    const int64_t half = kernels.cols / 2, columns = (out + half - 1) / half * kernels.cols;
    kernels.hidden_region(a, {0, rows, 0, columns}, fresh_of<float>(kernels.scratch(a)));
  }
  const Array again = result(grad.bytes), d_gate = result(grad.bytes);
  kernels.pointwise({up, gate, grad.data, again.data, d_gate.data, rows * out, act, dtype}, 0,
                    rows * out);
  for (const Array& made : {hidden, up, gate, again, grad, d_gate}) answer(made);
}

void cross_entropy() {
  const DType dtype = element();
  const int64_t rows = number(), classes = number();
  const float smoothing = real(), z_loss = real(), softcap = real();
  const Array logits = array(), target = array();
  const Array grad = result(logits.bytes), loss = result(rows * 4);
  const CrossEntropy a{logits,
                       target.as<int64_t>(),
                       nullptr,
                       nullptr,
                       loss.as<float>(),
                       grad.data,
                       rows,
                       classes,
                       -100,
                       1.0f,
                       static_cast<float>(classes),
                       smoothing,
                       z_loss,
                       softcap,
                       false,
                       dtype};
  cross_entropy_kernels().rows(a, fresh_of<float>(cross_entropy_scratch(classes)), 0, rows);
  answer(loss);
  answer(grad);
}

// Sides along k or across it; to fp32 sums or rounded.
void product() {
  const DType dtype = element();
  const int64_t k = number(), m = number(), n = number();
  const bool a_along = number() != 0, b_along = number() != 0, sums = number() != 0;
  const Array a = array(), b = array();
  const auto side = [&](const Array& values, int64_t count, bool along) {
    return along ? Operand{values, k, 1} : Operand{values, 1, count};
  };
  const Array y = result(m * n * (sums || dtype == DType::kFloat32 ? 4 : 2));
  const Product p{
      side(a, m, a_along), side(b, n, b_along), nullptr, y.data, m, n, k, n, false, sums, dtype};
  const auto& kernels = linear_kernels();
  kernels.product(p, {0, m, 0, n}, fresh_of<float>(kernels.scratch(p)));
  answer(y);
}

void attention() {
  Attention a{};
  a.dtype = element();
  a.batch = 1;
  a.heads = number();
  a.kv_heads = number();
  a.tq = number();
  a.tk = number();
  a.d = a.dv = number();
  a.causal = number() != 0;
  a.softcap = real();
  a.scale = 1.0f / std::sqrt(static_cast<float>(a.d));
  a.lse_head = a.lse_batch = a.tq;
  a.lse_size = a.heads * a.tq;
  const Array q = array(), k = array(), v = array(), grad = array();
  const auto rows = [&](void* data, int64_t length) {
    return HeadRows{data, 0, length * a.d, a.d};
  };
  a.q = rows(q.data, a.tq);
  a.k = rows(k.data, a.tk);
  a.v = rows(v.data, a.tk);
  const Array out = result(q.bytes), dq = result(q.bytes), dk = result(k.bytes);
  const Array dv = result(v.bytes);
  float* lse = fresh_of<float>(2 * a.lse_size);
  const auto& kernels = attention_kernels();
  const AttentionForward f{a, rows(out.data, a.tq), lse, 2};
  float* scratch = fresh_of<float>(kernels.forward_scratch(f));
  for (int64_t t = 0; t < a.kv_heads * attention_query_chunks(a, 2); ++t) {
    kernels.forward(f, t, scratch);
  }
  const AttentionBackward g{a,
                            f.out,
                            rows(grad.data, a.tq),
                            rows(dq.data, a.tq),
                            rows(dk.data, a.tk),
                            rows(dv.data, a.tk),
                            lse,
                            nullptr,
                            2,
                            false};
  scratch = fresh_of<float>(kernels.backward_scratch(g));
  for (int64_t t = 0; t < a.kv_heads; ++t) kernels.backward(g, t, scratch);
  for (const Array& made : {out, dq, dk, dv}) answer(made);
}

void decode_attention() {
  DecodeAttentionArgs a{};
  a.dtype = element();
  a.batch = 1;
  a.heads = number();
  a.kv_heads = number();
  a.queries = number();
  a.head_dim = a.value_dim = number();
  const int64_t capacity = number(), length = number(), first = 0;
  const Array q = array(), k = array(), v = array();
  const Array out = result(q.bytes);
  a.q = q;
  a.k = k;
  a.v = v;
  a.out = out.data;
  a.q_head = a.out_head = a.queries * a.head_dim;
  a.q_row = a.out_row = a.k_row = a.v_row = a.head_dim;
  a.k_head = a.v_head = capacity * a.head_dim;
  a.lengths = &length;
  a.first_key = &first;
  const int64_t tasks[] = {0, a.kv_heads * decode_pieces(length, a.kv_heads)};
  a.first_task = tasks;
  a.scale = 1.0f / std::sqrt(static_cast<float>(a.head_dim));
  const int64_t rows = a.heads / a.kv_heads * a.queries;
  a.partial = fresh_of<float>(tasks[1] * rows * (a.value_dim + 2));
  decode_attention_kernels().attend(a, 0, tasks[1]);
  decode_attention_kernels().combine(a, 0, a.heads * a.queries);
  answer(out);
}

void quantized_linear() {
  const DType dtype = element();
  const auto form = static_cast<QuantizedForm>(number());
  const int64_t rows = number(), in = number(), out = number(), group = number();
  const int digits = static_cast<int>(number());
  const Array x = array(), values = array(), scale = array(), minimum = array();
  const Array y = result(x.bytes / in * out), w = result(out * in * 4);
  const auto& kernels = quantized_linear_kernels();
  const int64_t panels = (out + kQuantizedPanel - 1) / kQuantizedPanel;
  void* q = fresh(static_cast<size_t>(rows * quantized_row_bytes(in, digits)));
  kernels.quantize({x, q, in, in, digits, form, dtype}, 0, rows);
  kernels.forward(
      {q, values, scale, minimum, nullptr, y.data, rows, in, out, group, out, digits, form, dtype},
      0, panels);
  kernels.dequantize({values, scale, minimum, w.data, in, out, group, 0, form, DType::kFloat32}, 0,
                     panels);
  answer(y);
  answer(w);
}

void sample() {
  const DType dtype = element();
  const int64_t rows = number(), vocab = number(), top_k = number();
  const float temperature = real(), top_p = real(), min_p = real();
  const Array logits = array(), uniform = array();
  const Array token = result(rows * 8);
  const Sample a{logits,
                 uniform.as<double>(),
                 token.as<int64_t>(),
                 rows,
                 vocab,
                 vocab,
                 top_k,
                 temperature,
                 top_p,
                 min_p,
                 dtype};
  float* scratch = fresh_of<float>(sample_kernels().scratch(vocab));
  for (int64_t r = 0; r < rows; ++r) {
    if (!sample_kernels().forward(a, r, scratch)) die("sample refused a row");
  }
  answer(token);
}

// The plan's stages are other rows' products and norms; its own part that is quickly shown is the
// residual stream's.
void plan_norm() {
  PlanStep step;
  step.dtype = element();
  step.batch = number();
  step.hidden = number();
  step.eps = real();
  const Array x = array(), weight = array();
  step.x = x.as<float>();
  const Array to = result(step.batch * step.hidden * (step.dtype == DType::kFloat32 ? 4 : 2));
  decode_plan_kernels().norm(step, {weight, nullptr}, to.data);
  answer(to);
}

struct Case {
  const char* name;
  void (*run)();
};
const Case kCases[] = {
    {"convert", convert},
    {"rms_norm", [] { norm(rms_norm_kernels()); }},
    {"layer_norm", [] { norm(layer_norm_kernels()); }},
    {"rope", rope},
    {"rope_append", rope_append},
    {"activation", activation},
    {"linear", linear},
    {"feed_forward", feed_forward},
    {"cross_entropy", cross_entropy},
    {"product", product},
    {"attention", attention},
    {"decode_attention", decode_attention},
    {"quantized_linear", quantized_linear},
    {"sample", sample},
    {"decode_plan", plan_norm},
};

}  // namespace

int main(int argc, char**) {
  if (argc > 1) {  // what there is
    for (const Case& c : kCases) std::puts(c.name);
    return 0;
  }
  const auto bytes = static_cast<size_t>(number());
  std::string name(bytes, ' ');
  read(name.data(), bytes);
  for (const Case& c : kCases) {
    if (name == c.name) {
      c.run();
      for (void* p : owned) std::free(p);
      return 0;
    }
  }
  die("no case " + name);
}
