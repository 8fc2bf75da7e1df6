// Binding of decode_attention: cuts the keys into tasks, splits them over threads, registers the
// CPU kernels.
#include "torch/decode_attention.h"

#include <vector>

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

Tensor decode_attention(const Tensor& q_, const Tensor& k_, const Tensor& v_,
                        const std::optional<Tensor>& lengths_, int64_t length, double scale,
                        int64_t window, const std::optional<Tensor>& slopes_,
                        const std::optional<Tensor>& sinks_, double softcap,
                        const std::optional<Tensor>& table, const std::optional<Tensor>& mask,
                        const std::optional<Tensor>& k_scale,
                        const std::optional<Tensor>& v_scale) {
  const Tensor q = unit_stride(q_), k = unit_stride(k_), v = unit_stride(v_);
  const auto lengths = dense(lengths_), slopes = dense(slopes_), sinks = dense(sinks_);
  const DecodeTensors tensors{q, k, v, lengths, slopes, sinks, table, mask, k_scale, v_scale};
  DecodeAttentionArgs args = decode_arguments(tensors, scale, window, softcap);
  Tensor out = decode_result(args, q, aoti_torch_device_type_cpu(), 0);
  if (out.numel() == 0) return out;

  const int64_t batch = args.batch, heads = args.heads, queries = args.queries;
  const int64_t kv_heads = args.kv_heads, value_dim = args.value_dim;
  std::vector<int64_t> plan(static_cast<size_t>(3 * batch + 1));
  int64_t *length_of = plan.data(), *first_key = length_of + batch, *first_task = first_key + batch;
  const void* given = data_or_null(lengths);
  const bool wide = lengths && lengths->scalar_type() == ScalarType::Long;
  const std::vector<int64_t> pages = table ? pages_of(*table) : std::vector<int64_t>();
  const int64_t page_size = k.size(2), table_row = table ? table->size(1) : 0;
  const int64_t capacity = decode_capacity(tensors);
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
  args.lengths = length_of, args.first_key = first_key, args.first_task = first_task;
  args.partial = cut ? static_cast<float*>(partial->mutable_data_ptr()) : nullptr;
  if (table) args.table = pages.data();
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
