// What the bindings of decode_attention share: checks, and what of the contract no device changes.
#pragma once
#include "ops/decode_attention.h"

#include "torch/alloc.h"

namespace fastlm {

// The arguments of the operator, the last dimension of q, k and v dense.
struct DecodeTensors {
  const Tensor &q, &k, &v;
  const std::optional<Tensor>&lengths, &slopes, &sinks, &table, &mask, &k_scale, &v_scale;
};

inline bool is_index(const Tensor& t) {
  return t.scalar_type() == ScalarType::Long || t.scalar_type() == ScalarType::Int;
}

inline Scales scales_of(const Tensor& scales, const Tensor& cache) {
  bool fits = scales.dim() == 3 && dtype_of(scales) != DType::kBFloat16;
  for (int64_t d = 0; d < 3 && fits; ++d) fits = scales.size(d) == cache.size(d);
  STD_TORCH_CHECK(fits, "decode_attention: scales must be float32 or float16 [rows, heads, keys]");
  return {scales.const_data_ptr(), scales.stride(0), scales.stride(1), scales.stride(2),
          dtype_of(scales)};
}

inline DecodeMask mask_of(const Tensor& mask, const int64_t (&full)[4]) {
  DecodeMask m{mask.const_data_ptr(), 0, 0, 0, 0, mask.scalar_type() == ScalarType::Float};
  int64_t* strides[] = {&m.batch, &m.head, &m.row, &m.key};
  const int64_t dims = mask.dim();
  bool fits = dims <= 4 && (m.added || mask.scalar_type() == ScalarType::Bool);
  for (int64_t d = 0; d < dims && fits; ++d) {
    const int64_t at = 4 - dims + d;
    fits = mask.size(d) == 1 || mask.size(d) == full[at];
    if (mask.size(d) != 1) *strides[at] = mask.stride(d);
  }
  STD_TORCH_CHECK(fits, "decode_attention: mask must be bool or float32 and broadcastable");
  return m;
}

// Keys that a sequence's cache holds.
inline int64_t decode_capacity(const DecodeTensors& t) {
  return t.table ? t.table->size(1) * t.k.size(2) : t.k.size(2);
}

// Checks, and everything but the lengths, the pages and the result.
inline DecodeAttentionArgs decode_arguments(const DecodeTensors& t, double scale, int64_t window,
                                            double softcap) {
  const auto& [q, k, v, lengths, slopes, sinks, table, mask, k_scale, v_scale] = t;
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4,
                  "decode_attention: q, k_cache and v_cache must have 4 dimensions");
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2);
  const int64_t kv_heads = k.size(1), value_dim = v.size(3);
  const int64_t most = std::max(q.size(3), value_dim);
  const bool scaled = k_scale.has_value();
  const ScalarType cached = scaled ? ScalarType::Char : q.scalar_type();
  STD_TORCH_CHECK((table || k.size(0) == batch) && v.size(0) == k.size(0) && kv_heads > 0 &&
                      heads % kv_heads == 0 && v.size(1) == kv_heads && v.size(2) == k.size(2) &&
                      k.size(3) == q.size(3) && q.size(3) > 0 && most <= kDecodeMaxHead &&
                      window >= 0 && softcap >= 0 && k.scalar_type() == cached &&
                      v.scalar_type() == cached && v_scale.has_value() == scaled,
                  "decode_attention: the arguments do not fit each other");
  STD_TORCH_CHECK(
      !lengths || (lengths->dim() == 1 && lengths->size(0) == batch && is_index(*lengths)),
      "decode_attention: lengths must be int32 or int64 [", batch, "]");
  STD_TORCH_CHECK(
      !slopes || (slopes->size(-1) == heads &&
                  (slopes->dim() == 1 || (slopes->dim() == 2 && slopes->size(0) == batch))),
      "decode_attention: alibi_slopes must be [", heads, "] or [", batch, ", ", heads, "]");
  STD_TORCH_CHECK(!sinks || (sinks->dim() == 1 && sinks->size(0) == heads),
                  "decode_attention: sinks must be [", heads, "]");
  STD_TORCH_CHECK(!table || (table->dim() == 2 && table->size(0) == batch && is_index(*table)),
                  "decode_attention: block_table must be int32 or int64 [", batch, ", pages]");

  DecodeAttentionArgs args{};
  args.q = q.const_data_ptr();
  args.k = k.const_data_ptr();
  args.v = v.const_data_ptr();
  args.q_batch = q.stride(0), args.q_head = q.stride(1), args.q_row = q.stride(2);
  args.k_batch = k.stride(0), args.k_head = k.stride(1), args.k_row = k.stride(2);
  args.v_batch = v.stride(0), args.v_head = v.stride(1), args.v_row = v.stride(2);
  args.batch = batch, args.heads = heads, args.kv_heads = kv_heads, args.queries = queries;
  args.head_dim = q.size(3), args.value_dim = value_dim;
  args.window = window;
  args.scale = static_cast<float>(scale);
  args.softcap = static_cast<float>(softcap);
  args.slopes = static_cast<const float*>(data_or_null(slopes));
  args.slopes_batch = slopes && slopes->dim() == 2 ? heads : 0;
  args.sinks = static_cast<const float*>(data_or_null(sinks));
  args.dtype = dtype_of(q);
  if (table) args.table_row = table->size(1), args.page_size = k.size(2);
  if (scaled) args.k_scale = scales_of(*k_scale, k), args.v_scale = scales_of(*v_scale, v);
  if (mask) args.mask = mask_of(*mask, {batch, heads, queries, decode_capacity(t)});
  return args;
}

// The result lies as [B, Tq, Hq, Dv], so that joining the heads afterwards moves nothing.
inline Tensor decode_result(DecodeAttentionArgs& args, const Tensor& q, int32_t device_type,
                            int32_t device) {
  const int64_t sizes[] = {args.batch, args.heads, args.queries, args.value_dim};
  const int64_t row = std::max<int64_t>(args.heads * args.value_dim, 1);
  const int64_t strides[] = {std::max<int64_t>(args.queries, 1) * row,
                             std::max<int64_t>(args.value_dim, 1), row, 1};
  Tensor out = empty_strided(sizes, strides, 4, q.scalar_type(), device_type, device);
  args.out = out.mutable_data_ptr();
  args.out_batch = strides[0], args.out_head = strides[1], args.out_row = strides[2];
  return out;
}

}  // namespace fastlm
