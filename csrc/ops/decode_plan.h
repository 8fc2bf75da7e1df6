// Contract of the decode plan's own kernels: the stages of one token that no operator has alone.
// Attention over the cache is decode_attention's.
#pragma once
#include "common/dtype.h"
#include "ops/activation_kind.h"
#include "ops/norm.h"
#include "ops/quantized_linear.h"

namespace fastlm {

constexpr int64_t kPlanMaxBatch = 16;
constexpr int64_t kPlanMaxHead = 256;
constexpr int64_t kPlanUnit = 16;  // outputs of one item of `add`, `hidden` and `logits`

// y = x w^T + bias, the weight in the plan's type or, where it has a scale, in integers
struct PlanProduct {
  const void* w = nullptr;        // [out, in] of the plan's type, or packed: ops/quantized_linear.h
  const void* bias = nullptr;     // [out] of the plan's type, or null
  const void* scale = nullptr;    // of packed integers
  const void* minimum = nullptr;  // of packed integers, or null
  int64_t out = 0, in = 0;
  int64_t group = 0;  // values of a row that share a scale
  QuantizedForm form = QuantizedForm::kInt8;
  int digits = 0;           // of the rows that integers are multiplied with
  int64_t stride = 0;       // values from a row of a weight without a scale to the next
  bool transposed = false;  // such a weight is [in, out]
};

struct PlanNorm {
  const void* weight = nullptr;  // [hidden] of the plan's type
  const void* bias = nullptr;    // the same, or null
};

struct PlanLayer {
  PlanNorm attention_norm, mlp_norm;
  PlanProduct q, k, v, out, gate, up, down;  // gate.w is null in a plain feed-forward
  void* keys = nullptr;                      // [batch or 1, kv_heads, capacity, head_dim]
  void* values = nullptr;
};

// One token of each sequence, or `batch` tokens of one sequence that follow each other: these share
// a cache, and every row is computed with the bits it would have alone. Between the stages the
// residual stream and the logits are fp32; what a product takes is of the plan's type.
struct PlanStep {
  DType dtype = DType::kFloat32;
  int64_t batch = 0, hidden = 0, heads = 0, kv_heads = 0, head_dim = 0, vocab = 0;
  float eps = 0.0f;
  bool centred = false;  // layer_norm, else rms_norm
  Activation act = Activation::kSilu;
  bool one_sequence = false;
  bool near = false;              // whether the weights may stay in the caches from token to token
  int64_t capacity = 0;           // tokens of the cache
  const void* embed = nullptr;    // [vocab, hidden]
  const void* learned = nullptr;  // [positions, hidden], or null
  const float* cos = nullptr;     // [positions, head_dim / 2], or null
  const float* sin = nullptr;
  const int64_t* tokens = nullptr;     // [batch]
  const int64_t* positions = nullptr;  // [batch], where the tokens stand in their text
  const int64_t* slots = nullptr;      // [batch], where they go in the cache
  float* x = nullptr;                  // [batch, hidden] the residual stream
  void* q = nullptr;                   // [batch, heads, head_dim]
  const QuantizedLinearKernels* quantized = nullptr;
};

// `rows` are what the product takes: of the plan's type, or quantized for a weight of integers.
// Products of integers are cut at whole panels, so their heads must be multiples of 16.
struct DecodePlanKernels {
  // x = the tokens' embeddings, plus those of their positions
  void (*embed)(const PlanStep&);
  // to [batch, hidden] = norm(x)
  void (*norm)(const PlanStep&, const PlanNorm&, void* to);
  // Heads [begin, end) of q, then k, then v, from normalised rows: projected, rotated; q to its
  // buffer, k and v to the cache.
  void (*project)(const PlanStep&, const PlanLayer&, const void* rows, int64_t begin, int64_t end);
  // The others count units of kPlanUnit outputs.
  // x += rows w^T + bias
  void (*add)(const PlanStep&, const PlanProduct&, const void* rows, int64_t begin, int64_t end);
  // to = act(gate) * up, or act(up)
  void (*hidden)(const PlanStep&, const PlanLayer&, const void* rows, void* to, int64_t begin,
                 int64_t end);
  // to = rows w^T + bias in fp32, and for each row of the batch the largest of these outputs among
  // the first `limit` and the first place where it stands; -inf where there is none, NaN where one
  // of them is not finite
  void (*logits)(const PlanStep&, const PlanProduct&, const void* rows, float* to, int64_t limit,
                 float* largest, int64_t* at, int64_t begin, int64_t end);
};

}  // namespace fastlm
