// Binding of decode_attention's CUDA kernels: allocates, launches, registers. Lengths and block
// table stay on the device.
#include "torch/decode_attention.h"

#include "torch/cuda/device.h"

namespace fastlm {
namespace {

Tensor decode_attention(const Tensor& q_, const Tensor& k_, const Tensor& v_,
                        const std::optional<Tensor>& lengths_, int64_t length, double scale,
                        int64_t window, const std::optional<Tensor>& slopes_,
                        const std::optional<Tensor>& sinks_, double softcap,
                        const std::optional<Tensor>& table_, const std::optional<Tensor>& mask,
                        const std::optional<Tensor>& k_scale,
                        const std::optional<Tensor>& v_scale) {
  const auto check_place = [&](const char* name, const std::optional<Tensor>& t) {
    STD_TORCH_CHECK(!t || cuda::same_place(*t, q_), "decode_attention: ", name,
                    " lies on another device than q");
  };
  check_place("k_cache", k_), check_place("v_cache", v_), check_place("lengths", lengths_);
  check_place("alibi_slopes", slopes_), check_place("sinks", sinks_), check_place("mask", mask);
  check_place("block_table", table_), check_place("k_scale", k_scale);
  check_place("v_scale", v_scale);
  const cuda::OnDevice device(q_);
  const Tensor q = unit_stride(q_), k = unit_stride(k_), v = unit_stride(v_);
  const auto lengths = dense(lengths_), slopes = dense(slopes_), sinks = dense(sinks_);
  const auto table = dense(table_);
  const DecodeTensors tensors{q, k, v, lengths, slopes, sinks, table, mask, k_scale, v_scale};
  DecodeAttentionArgs args = decode_arguments(tensors, scale, window, softcap);
  const Tensor out = decode_result(args, q, device.type(), device.index());

  cuda::DecodeAttentionLaunch more{};
  more.keys = decode_capacity(tensors);
  STD_TORCH_CHECK(lengths || (length >= 0 && length <= more.keys),
                  "decode_attention: lengths must be between 0 and ", more.keys,
                  ", the cache's size, got ", length);
  more.length = length;
  if (lengths) {
    more.lengths = lengths->const_data_ptr();
    more.wide_lengths = lengths->scalar_type() == ScalarType::Long;
  }
  if (table) {
    more.table = table->const_data_ptr();
    more.wide_table = table->scalar_type() == ScalarType::Long;
    more.pages = k.size(0);
  }
  more.piece = cuda::decode_piece_keys(more.keys);
  more.pieces = std::max<int64_t>((more.keys + more.piece - 1) / more.piece, 1);
  std::optional<Tensor> partial;
  if (more.pieces > 1) {
    const int64_t rows = args.batch * args.heads * args.queries;
    partial = device.empty({rows, more.pieces, args.value_dim + 2}, ScalarType::Float);
    args.partial = static_cast<float*>(partial->mutable_data_ptr());
  }
  cuda::check(cuda::decode_attention(args, more, device.stream()), "decode_attention");
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlm, CUDA, m) {
  m.impl("decode_attention", TORCH_BOX(&decode_attention));
}

}  // namespace fastlm
