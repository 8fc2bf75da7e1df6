// Binding of rope_append: looks at lengths and pages before anything is written, splits tokens over
// threads, registers the CPU kernel.
#include "torch/rope_append.h"

#include "cpu/isa.h"

FASTLM_KERNEL_TABLE(RopeAppendKernels, rope_append)

namespace fastlm {
namespace {

int64_t index_at(const void* indices, bool wide, int64_t i) {
  return wide ? static_cast<const int64_t*>(indices)[i] : static_cast<const int32_t*>(indices)[i];
}

void check_places(const RopeAppendArgs& a) {
  const int64_t keys = a.table == nullptr ? a.page_size : a.table_pages * a.page_size;
  const int64_t most = std::min(keys, a.places);
  for (int64_t b = 0; b < a.batch; ++b) {
    const int64_t length = a.lengths == nullptr ? a.length : index_at(a.lengths, a.wide_lengths, b);
    STD_TORCH_CHECK(length >= a.tokens && length <= most, "rope_append: lengths must be between ",
                    a.tokens, " and ", most, ", got ", length);
    if (a.table == nullptr || a.tokens == 0) continue;
    for (int64_t i = (length - a.tokens) / a.page_size; i * a.page_size < length; ++i) {
      const int64_t page = index_at(a.table, a.wide_table, b * a.table_row + i);
      STD_TORCH_CHECK(page >= 0 && page < a.pages, "rope_append: block_table must name pages 0 to ",
                      a.pages - 1, ", got ", page);
    }
  }
}

Tensor rope_append(const Tensor& q_, const Tensor& k_, const Tensor& v_,
                   const std::optional<Tensor>& cos_, const std::optional<Tensor>& sin_,
                   const Tensor& k_cache, const Tensor& v_cache,
                   const std::optional<Tensor>& lengths_, int64_t length,
                   const std::optional<Tensor>& table_, const std::optional<Tensor>& q_weight_,
                   const std::optional<Tensor>& k_weight_, int64_t rotary, bool interleaved,
                   double eps, double offset) {
  const Tensor q = unit_stride(q_), k = unit_stride(k_);
  const Tensor v = unit_stride(v_);
  const auto cos = unit_stride(cos_), sin = unit_stride(sin_);
  const auto lengths = dense(lengths_), table = dense(table_);
  const auto q_weight = dense(q_weight_), k_weight = dense(k_weight_);
  Tensor out = empty_in_order(q_);
  const RopeAppendArgs args =
      rope_append_arguments({q, k, v, cos, sin, k_cache, v_cache, lengths, length, table, q_weight,
                             k_weight, rotary, interleaved, eps, offset},
                            out);
  check_places(args);
  const int64_t row = args.head_dim * (args.heads + args.kv_heads) + args.value_dim * args.kv_heads;
  const auto& kernels = rope_append_kernels();
  parallel_rows(args.batch * args.tokens, 2 * row * static_cast<int64_t>(q.element_size()),
                [&](int64_t begin, int64_t end) { kernels.append(args, begin, end); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, m) { m.impl("rope_append", TORCH_BOX(&rope_append)); }

}  // namespace fastlm
