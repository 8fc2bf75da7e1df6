// Binding of decode_attention: cuts the keys into tasks, splits them over threads, registers the
// CPU kernels.
#include "ops/decode_attention.h"

#include <vector>

#include "torch/alloc.h"
#include "cpu/isa.h"

FASTLM_KERNEL_TABLE(DecodeAttentionKernels, decode_attention)

namespace fastlm {
namespace {

Tensor decode_attention(const Tensor& q_, const Tensor& k_, const Tensor& v_,
                        const std::optional<Tensor>& lengths_, int64_t length, double scale,
                        int64_t window, const std::optional<Tensor>& slopes_,
                        const std::optional<Tensor>& sinks_) {
  const Tensor q = unit_stride(q_), k = unit_stride(k_), v = unit_stride(v_);
  const auto lengths = dense(lengths_), slopes = dense(slopes_), sinks = dense(sinks_);
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2);
  const int64_t kv_heads = k.size(1), value_dim = v.size(3);
  const int64_t most = std::max(q.size(3), value_dim);
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && k.size(0) == batch &&
                      v.size(0) == batch && kv_heads > 0 && heads % kv_heads == 0 &&
                      v.size(1) == kv_heads && v.size(2) == k.size(2) && k.size(3) == q.size(3) &&
                      q.size(3) > 0 && most <= kDecodeMaxHead && window >= 0 &&
                      q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(),
                  "decode_attention: the arguments do not fit each other");
  STD_TORCH_CHECK(!lengths || (lengths->dim() == 1 && lengths->size(0) == batch &&
                               (lengths->scalar_type() == ScalarType::Long ||
                                lengths->scalar_type() == ScalarType::Int)),
                  "decode_attention: lengths must be int32 or int64 [", batch, "]");
  STD_TORCH_CHECK(
      !slopes || (slopes->size(-1) == heads &&
                  (slopes->dim() == 1 || (slopes->dim() == 2 && slopes->size(0) == batch))),
      "decode_attention: alibi_slopes must be [", heads, "] or [", batch, ", ", heads, "]");
  STD_TORCH_CHECK(!sinks || (sinks->dim() == 1 && sinks->size(0) == heads),
                  "decode_attention: sinks must be [", heads, "]");

  // The result lies as [B, Tq, Hq, Dv], so that joining the heads afterwards moves nothing.
  const int64_t sizes[] = {batch, heads, queries, value_dim};
  const int64_t row = std::max<int64_t>(heads * value_dim, 1);
  const int64_t strides[] = {std::max<int64_t>(queries, 1) * row, std::max<int64_t>(value_dim, 1),
                             row, 1};
  Tensor out = empty_strided(sizes, strides, 4, q.scalar_type(), aoti_torch_device_type_cpu(), 0);
  if (out.numel() == 0) return out;

  std::vector<int64_t> plan(static_cast<size_t>(3 * batch + 1));
  int64_t *length_of = plan.data(), *first_key = length_of + batch, *first_task = first_key + batch;
  const void* given = data_or_null(lengths);
  const bool wide = lengths && lengths->scalar_type() == ScalarType::Long;
  bool cut = false;
  int64_t keys = 0;
  for (int64_t b = 0; b < batch; ++b) {
    length_of[b] = given == nullptr ? length
                   : wide           ? static_cast<const int64_t*>(given)[b]
                                    : static_cast<const int32_t*>(given)[b];
    STD_TORCH_CHECK(length_of[b] >= 0 && length_of[b] <= k.size(2),
                    "decode_attention: lengths must be between 0 and ", k.size(2),
                    ", the cache's size, got ", length_of[b]);
    first_key[b] = window > 0 ? std::max<int64_t>(0, length_of[b] - queries - window + 1) : 0;
    const int64_t pieces = decode_pieces(length_of[b] - first_key[b], kv_heads);
    first_task[b + 1] = first_task[b] + kv_heads * pieces;
    keys += length_of[b] - first_key[b];
    cut = cut || pieces > 1;
  }
  const int64_t tasks = first_task[batch], rows = heads / kv_heads * queries;
  std::optional<Tensor> partial;
  if (cut) partial = empty_cpu({tasks, rows, value_dim + 2}, ScalarType::Float);
  const DecodeAttentionArgs args{q.const_data_ptr(),
                                 k.const_data_ptr(),
                                 v.const_data_ptr(),
                                 out.mutable_data_ptr(),
                                 q.stride(0),
                                 q.stride(1),
                                 q.stride(2),
                                 k.stride(0),
                                 k.stride(1),
                                 k.stride(2),
                                 v.stride(0),
                                 v.stride(1),
                                 v.stride(2),
                                 strides[0],
                                 strides[1],
                                 strides[2],
                                 batch,
                                 heads,
                                 kv_heads,
                                 queries,
                                 q.size(3),
                                 value_dim,
                                 length_of,
                                 first_key,
                                 first_task,
                                 window,
                                 static_cast<float>(scale),
                                 static_cast<const float*>(data_or_null(slopes)),
                                 slopes && slopes->dim() == 2 ? heads : 0,
                                 static_cast<const float*>(data_or_null(sinks)),
                                 cut ? static_cast<float*>(partial->mutable_data_ptr()) : nullptr,
                                 dtype_of(q)};
  // Rows that share a key's data make a task longer than its traffic tells.
  const int64_t width = (q.size(3) + value_dim) * (args.dtype == DType::kFloat32 ? 4 : 2);
  const int64_t bytes = keys * kv_heads * width / tasks * (1 + rows / 4);
  const auto& kernels = decode_attention_kernels();
  parallel_rows(tasks, bytes,
                [&](int64_t begin, int64_t end) { kernels.attend(args, begin, end); });
  if (cut) {
    parallel_rows(batch * heads * queries, tasks / (batch * kv_heads) * value_dim * 4,
                  [&](int64_t begin, int64_t end) { kernels.combine(args, begin, end); });
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, m) {
  m.impl("decode_attention", TORCH_BOX(&decode_attention));
}

}  // namespace fastlm
