// Binding of decode_attention: cuts the keys into tasks, splits them over threads, registers the
// CPU kernels.
#include "ops/decode_attention.h"

#include <vector>

#include "torch/alloc.h"
#include "cpu/isa.h"

FASTLM_KERNEL_TABLE(DecodeAttentionKernels, decode_attention)

namespace fastlm {
namespace {

// A table's pages as the kernel reads them.
std::vector<int64_t> pages_of(const Tensor& table) {
  const Tensor t = dense(table);
  const auto n = static_cast<size_t>(t.numel());
  std::vector<int64_t> pages(n);
  if (t.scalar_type() == ScalarType::Long) {
    std::copy_n(static_cast<const int64_t*>(t.const_data_ptr()), n, pages.begin());
  } else {
    std::copy_n(static_cast<const int32_t*>(t.const_data_ptr()), n, pages.begin());
  }
  return pages;
}

bool is_index(const Tensor& t) {
  return t.scalar_type() == ScalarType::Long || t.scalar_type() == ScalarType::Int;
}

Scales scales_of(const Tensor& scales, const Tensor& cache) {
  bool fits = scales.dim() == 3 && dtype_of(scales) != DType::kBFloat16;
  for (int64_t d = 0; d < 3 && fits; ++d) fits = scales.size(d) == cache.size(d);
  STD_TORCH_CHECK(fits, "decode_attention: scales must be float32 or float16 [rows, heads, keys]");
  return {scales.const_data_ptr(), scales.stride(0), scales.stride(1), scales.stride(2),
          dtype_of(scales)};
}

DecodeMask mask_of(const Tensor& mask, const int64_t (&full)[4]) {
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

Tensor decode_attention(const Tensor& q_, const Tensor& k_, const Tensor& v_,
                        const std::optional<Tensor>& lengths_, int64_t length, double scale,
                        int64_t window, const std::optional<Tensor>& slopes_,
                        const std::optional<Tensor>& sinks_, double softcap,
                        const std::optional<Tensor>& table, const std::optional<Tensor>& mask,
                        const std::optional<Tensor>& k_scale,
                        const std::optional<Tensor>& v_scale) {
  const Tensor q = unit_stride(q_), k = unit_stride(k_), v = unit_stride(v_);
  const auto lengths = dense(lengths_), slopes = dense(slopes_), sinks = dense(sinks_);
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
  const std::vector<int64_t> pages = table ? pages_of(*table) : std::vector<int64_t>();
  const int64_t page_size = k.size(2), table_row = table ? table->size(1) : 0;
  const int64_t capacity = table ? table_row * page_size : page_size;
  bool cut = false;
  int64_t keys = 0;
  for (int64_t b = 0; b < batch; ++b) {
    length_of[b] = given == nullptr ? length
                   : wide           ? static_cast<const int64_t*>(given)[b]
                                    : static_cast<const int32_t*>(given)[b];
    STD_TORCH_CHECK(length_of[b] >= 0 && length_of[b] <= capacity,
                    "decode_attention: lengths must be between 0 and ", capacity,
                    ", the cache's size, got ", length_of[b]);
    first_key[b] = window > 0 ? std::max<int64_t>(0, length_of[b] - queries - window + 1) : 0;
    for (int64_t i = 0; table && i * page_size < length_of[b]; ++i) {
      const int64_t page = pages[static_cast<size_t>(b * table_row + i)];
      STD_TORCH_CHECK((page >= 0 && page < k.size(0)) || (i + 1) * page_size <= first_key[b],
                      "decode_attention: block_table must name pages 0 to ", k.size(0) - 1,
                      ", got ", page);
    }
    const int64_t pieces = decode_pieces(length_of[b] - first_key[b], kv_heads);
    first_task[b + 1] = first_task[b] + kv_heads * pieces;
    keys += length_of[b] - first_key[b];
    cut = cut || pieces > 1;
  }
  const int64_t tasks = first_task[batch], rows = heads / kv_heads * queries;
  std::optional<Tensor> partial;
  if (cut) partial = empty_cpu({tasks, rows, value_dim + 2}, ScalarType::Float);
  DecodeAttentionArgs args{};
  args.q = q.const_data_ptr();
  args.k = k.const_data_ptr();
  args.v = v.const_data_ptr();
  args.out = out.mutable_data_ptr();
  args.q_batch = q.stride(0), args.q_head = q.stride(1), args.q_row = q.stride(2);
  args.k_batch = k.stride(0), args.k_head = k.stride(1), args.k_row = k.stride(2);
  args.v_batch = v.stride(0), args.v_head = v.stride(1), args.v_row = v.stride(2);
  args.out_batch = strides[0], args.out_head = strides[1], args.out_row = strides[2];
  args.batch = batch, args.heads = heads, args.kv_heads = kv_heads, args.queries = queries;
  args.head_dim = q.size(3), args.value_dim = value_dim;
  args.lengths = length_of, args.first_key = first_key, args.first_task = first_task;
  args.window = window;
  args.scale = static_cast<float>(scale);
  args.softcap = static_cast<float>(softcap);
  args.slopes = static_cast<const float*>(data_or_null(slopes));
  args.slopes_batch = slopes && slopes->dim() == 2 ? heads : 0;
  args.sinks = static_cast<const float*>(data_or_null(sinks));
  args.partial = cut ? static_cast<float*>(partial->mutable_data_ptr()) : nullptr;
  args.dtype = dtype_of(q);
  if (table) args.table = pages.data(), args.table_row = table_row, args.page_size = page_size;
  if (scaled) args.k_scale = scales_of(*k_scale, k), args.v_scale = scales_of(*v_scale, v);
  if (mask) args.mask = mask_of(*mask, {batch, heads, queries, capacity});
  // Rows that share a key's data make a task longer than its traffic tells.
  const int64_t width = (q.size(3) + value_dim) * static_cast<int64_t>(k.element_size());
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
