// What the bindings of rope_append share: the checks of everything but values, the contract.
#pragma once
#include "ops/rope_append.h"

#include <limits>

#include "torch/rope.h"

namespace fastlm {

struct RopeAppendTensors {
  const Tensor &q, &k, &v;  // of unit last stride
  const std::optional<Tensor>&cos, &sin;
  const Tensor &k_cache, &v_cache;
  const std::optional<Tensor>& lengths;  // dense
  int64_t length;
  const std::optional<Tensor>&table, &q_weight, &k_weight;  // dense
  int64_t rotary;
  bool interleaved;
  double eps, offset;
};

inline std::optional<Tensor> unit_stride(const std::optional<Tensor>& t) {
  return t ? std::optional<Tensor>(unit_stride(*t)) : std::nullopt;
}

inline bool is_integral(const std::optional<Tensor>& t) {
  return !t || t->scalar_type() == ScalarType::Long || t->scalar_type() == ScalarType::Int;
}

// Checks that the tensors fit each other and describes them; `out` lies like q.
inline RopeAppendArgs rope_append_arguments(const RopeAppendTensors& x, const Tensor& out) {
  const char* unfit = "rope_append: the arguments do not fit each other";
  const Tensor &q = x.q, &k = x.k, &v = x.v, &keys = x.k_cache, &values = x.v_cache;
  STD_TORCH_CHECK(
      q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && keys.dim() == 4 && values.dim() == 4, unfit);
  const int64_t batch = q.size(0), tokens = q.size(2), size = q.size(3);
  const int64_t kv_heads = k.size(1), value_size = v.size(3);
  const auto is = [](const Tensor& t, int64_t a, int64_t b, int64_t c, int64_t d) {
    return t.size(0) == a && t.size(1) == b && t.size(2) == c && t.size(3) == d;
  };
  const auto in_rows = [](const Tensor& t) { return t.size(-1) <= 1 || t.stride(-1) == 1; };
  const int64_t rows = x.table ? keys.size(0) : batch, block = keys.size(2);
  STD_TORCH_CHECK(is(k, batch, kv_heads, tokens, size) &&
                      is(v, batch, kv_heads, tokens, value_size) &&
                      is(keys, rows, kv_heads, block, size) && in_rows(keys) &&
                      is(values, rows, kv_heads, block, value_size) && in_rows(values) &&
                      std::max(size, value_size) <= kRopeAppendMaxHead,
                  unfit);
  for (const Tensor* t : {&k, &v, &keys, &values}) {
    STD_TORCH_CHECK(t->scalar_type() == q.scalar_type(), unfit);
  }
  const auto like_or_wide = [&](const Tensor& t) {
    return t.scalar_type() == q.scalar_type() || t.scalar_type() == ScalarType::Float;
  };
  for (const auto* w : {&x.q_weight, &x.k_weight}) {
    STD_TORCH_CHECK(!*w || ((*w)->dim() == 1 && (*w)->size(0) == size && like_or_wide(**w)), unfit);
  }
  STD_TORCH_CHECK(
      !x.q_weight || !x.k_weight || x.q_weight->scalar_type() == x.k_weight->scalar_type(), unfit);
  STD_TORCH_CHECK(is_integral(x.lengths) && is_integral(x.table) &&
                      (!x.lengths || (x.lengths->dim() == 1 && x.lengths->size(0) == batch)) &&
                      (!x.table || (x.table->dim() == 2 && x.table->size(0) == batch)),
                  "rope_append: lengths must be int32 or int64 [", batch,
                  "] and block_table int32 or int64 [", batch, ", pages]");
  STD_TORCH_CHECK(x.eps >= 0 && (x.cos || x.rotary == 0), unfit);
  RopeAppendArgs a{};
  if (x.cos || x.sin) {
    STD_TORCH_CHECK(x.cos && x.sin && x.cos->dim() == 2 && x.cos->sizes() == x.sin->sizes() &&
                        x.cos->scalar_type() == x.sin->scalar_type() && like_or_wide(*x.cos) &&
                        x.rotary > 0 && x.rotary % 2 == 0 && x.rotary <= size,
                    unfit);
    const int64_t width = x.cos->size(1);
    STD_TORCH_CHECK(
        (width == x.rotary || 2 * width == x.rotary) && in_rows(*x.cos) && in_rows(*x.sin), unfit);
    a.cos = x.cos->const_data_ptr(), a.sin = x.sin->const_data_ptr();
    a.cos_row = x.cos->stride(0), a.sin_row = x.sin->stride(0);
    a.rotary = x.rotary, a.full_width = width == x.rotary;
    a.table_dtype = dtype_of(*x.cos);
  }
  a.places = x.cos ? x.cos->size(0) : std::numeric_limits<int64_t>::max();
  a.q = q.const_data_ptr(), a.k = k.const_data_ptr(), a.v = v.const_data_ptr();
  a.out = out.mutable_data_ptr();
  a.k_cache = keys.mutable_data_ptr();
  a.v_cache = values.mutable_data_ptr();
  a.q_batch = q.stride(0), a.q_head = q.stride(1), a.q_token = q.stride(2);
  a.k_batch = k.stride(0), a.k_head = k.stride(1), a.k_token = k.stride(2);
  a.v_batch = v.stride(0), a.v_head = v.stride(1), a.v_token = v.stride(2);
  a.out_batch = out.stride(0), a.out_head = out.stride(1), a.out_token = out.stride(2);
  a.k_cache_row = keys.stride(0), a.k_cache_head = keys.stride(1), a.k_cache_token = keys.stride(2);
  a.v_cache_row = values.stride(0), a.v_cache_head = values.stride(1);
  a.v_cache_token = values.stride(2);
  a.q_weight = data_or_null(x.q_weight), a.k_weight = data_or_null(x.k_weight);
  a.weight_dtype = dtype_or_float(x.q_weight ? x.q_weight : x.k_weight);
  a.lengths = data_or_null(x.lengths), a.length = x.length;
  a.wide_lengths = x.lengths && x.lengths->scalar_type() == ScalarType::Long;
  a.page_size = block;
  if (x.table) {
    a.table = x.table->const_data_ptr();
    a.table_row = x.table->size(1), a.table_pages = x.table->size(1), a.pages = rows;
    a.wide_table = x.table->scalar_type() == ScalarType::Long;
  }
  a.batch = batch, a.heads = q.size(1), a.kv_heads = kv_heads, a.tokens = tokens;
  a.head_dim = size, a.value_dim = value_size;
  a.eps = static_cast<float>(x.eps), a.offset = static_cast<float>(x.offset);
  a.interleaved = x.interleaved;
  a.dtype = dtype_of(q);
  return a;
}

}  // namespace fastlm
