// rms_norm and layer_norm of few, very wide rows, which several blocks share: see norm_pieces().
// A first kernel sums each piece of a row, a second one applies what the pieces of the row add up
// to. Every warp adds them up for itself, in one order, so that no block waits for another.
#pragma once
#include "norm_layout.cuh"

namespace fastlm::cuda {
namespace {

// kNormPiece columns over the threads of a block, all in registers.
template <class T>
using Piece = Layout<kVector<T>, 128, kNormPiece / (128 * kVector<T>)>;

// The piece of a block: of row (or run of rows) `line`, `cols` columns from `first` on.
struct Cut {
  int64_t pieces, line, first, cols;
  __device__ explicit Cut(int64_t width) {
    pieces = (width + kNormPiece - 1) / kNormPiece;
    line = blockIdx.x / pieces;
    first = blockIdx.x % pieces * kNormPiece;
    cols = width - first < kNormPiece ? width - first : kNormPiece;
  }
};

// What is summed over a piece, and over a row: layer_norm's mean, the squares around it, the
// products of g*w with what they are squares of, and g*w. The last two for the backward pass.
struct Sums {
  float mean, squares, product, gw;
  __device__ void store(float* to) const {
    if (threadIdx.x != 0) return;
    const Vec<float, 4> all{mean, squares, product, gw};
    all.store(to);
  }
};

// The sums of a row from those of its pieces [pieces, 4].
template <bool kCentered>
__device__ inline Sums row_sums(const float* pieces, int64_t width) {
  const int64_t last = (width - 1) / kNormPiece;
  const float n = static_cast<float>(width);
  const auto each = [&](auto&& f) {
    for (int64_t p = threadIdx.x % 32; p <= last; p += 32) {
      Vec<float, 4> piece;
      piece.load(pieces + 4 * p);
      f(piece, static_cast<float>(p < last ? kNormPiece : width - last * kNormPiece));
    }
  };
  float mean = 0.0f;
  if constexpr (kCentered) {
    float sum[1] = {0.0f};
    each([&](const Vec<float, 4>& piece, float cols) { sum[0] = fmaf(piece[0], cols, sum[0]); });
    sum_over<32>(sum, nullptr);
    mean = sum[0] / n;
  }
  float totals[4] = {};  // squares, products, distances from the mean, g*w
  each([&](const Vec<float, 4>& piece, float cols) {
    const float d = kCentered ? piece[0] - mean : 0.0f;
    totals[0] += fmaf(cols * d, d, piece[1]);
    totals[1] += fmaf(piece[3], d, piece[2]);
    totals[2] = fmaf(cols, d, totals[2]);
    totals[3] += piece[3];
  });
  sum_over<32>(totals, nullptr);
  const float shift = totals[2] / n;
  return {mean + shift, fmaxf(totals[0] - shift * totals[2], 0.0f), totals[1] - shift * totals[3],
          totals[3]};
}

template <bool kCentered, class T>
__global__ void __launch_bounds__(128) forward_pieces_kernel(const NormForward a) {
  using L = Piece<T>;
  constexpr int kVec = L::kVec;
  __shared__ float shared[2 * (L::kBlock / 32)];
  const Cut cut(a.cols);
  const int64_t start = cut.line * a.cols + cut.first;
  const T* x = static_cast<const T*>(a.x) + start;
  const T* residual = static_cast<const T*>(a.residual);
  T* summed = static_cast<T*>(a.summed) + start;
  Vec<T, kVec> s[L::kSlots];
  float first[1] = {0.0f};  // the sum of squares, or of values
  for_vectors<L>(cut.cols, [&](int j, int64_t i) {
    s[j].load(x + i);
    if (residual != nullptr) {
      Vec<T, kVec> other;
      other.load(residual + start + i);
#pragma unroll
      for (int k = 0; k < kVec; ++k) s[j].set(k, s[j][k] + other[k]);
      store_wide(s[j], summed + i);
    }
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      first[0] = kCentered ? first[0] + s[j][k] : fmaf(s[j][k], s[j][k], first[0]);
    }
  });
  sum_over<L::kThreads>(first, shared);
  Sums sums{0.0f, first[0], 0.0f, 0.0f};
  if constexpr (kCentered) {
    const float n = static_cast<float>(cut.cols), mean = first[0] / n;
    float left[2] = {0.0f, 0.0f};  // of (s - mean) and its square
    for_vectors<L>(cut.cols, [&](int j, int64_t) {
#pragma unroll
      for (int k = 0; k < kVec; ++k) {
        const float d = s[j][k] - mean;
        left[0] += d;
        left[1] = fmaf(d, d, left[1]);
      }
    });
    sum_over<L::kThreads>(left, shared);
    const float shift = left[0] / n;
    sums = {mean + shift, fmaxf(left[1] - shift * left[0], 0.0f), 0.0f, 0.0f};
  }
  sums.store(a.pieces + 4 * static_cast<int64_t>(blockIdx.x));
}

template <bool kCentered, class T>
__global__ void __launch_bounds__(128) forward_apply_kernel(const NormForward a) {
  using L = Piece<T>;
  constexpr int kVec = L::kVec;
  const Cut cut(a.cols);
  const int64_t start = cut.line * a.cols + cut.first;
  const T* s = static_cast<const T*>(a.residual != nullptr ? a.summed : a.x) + start;
  T* y = static_cast<T*>(a.y) + start;
  const bool wide = a.weight_dtype == DType::kFloat32;
  Vec<T, kVec> v[L::kSlots];
  for_vectors<L>(cut.cols, [&](int j, int64_t i) { v[j].load(s + i); });  // ahead of the sums
  const Sums sums = row_sums<kCentered>(a.pieces + 4 * cut.line * cut.pieces, a.cols);
  const float rstd = rstd_of(sums.squares, a.cols, a.eps);
  for_vectors<L>(cut.cols, [&](int j, int64_t i) {
    float scale[kVec], bias[kVec];
    load_vector<T>(a.weight, wide, a.offset, 1.0f, cut.first + i, scale);
    if constexpr (kCentered) load_vector<T>(a.bias, wide, 0.0f, 0.0f, cut.first + i, bias);
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      if constexpr (kCentered) {
        v[j].set(k, fmaf((v[j][k] - sums.mean) * rstd, scale[k], bias[k]));
      } else {
        v[j].set(k, v[j][k] * rstd * scale[k]);
      }
    }
    store_wide(v[j], y + i);
  });
}

template <bool kCentered, class T>
__global__ void __launch_bounds__(128) backward_pieces_kernel(const NormBackward a) {
  using L = Piece<T>;
  constexpr int kVec = L::kVec;
  __shared__ float shared[4 * (L::kBlock / 32)];
  const Cut cut(a.cols);
  const int64_t start = cut.line * a.cols + cut.first;
  const T* x = static_cast<const T*>(a.x) + start;
  const T* grad = static_cast<const T*>(a.grad) + start;
  const bool wide = a.weight_dtype == DType::kFloat32;
  Vec<T, kVec> s[L::kSlots], g[L::kSlots];
  float sum[1] = {0.0f}, mean = 0.0f;
  for_vectors<L>(cut.cols, [&](int j, int64_t i) {
    s[j].load(x + i);
    g[j].load(grad + i);
#pragma unroll
    for (int k = 0; k < kVec; ++k) sum[0] += s[j][k];
  });
  if constexpr (kCentered) {
    sum_over<L::kThreads>(sum, shared);
    mean = sum[0] / static_cast<float>(cut.cols);
  }
  float totals[4] = {};  // of d*d, g*w*d, d = s - mean and g*w
  for_vectors<L>(cut.cols, [&](int j, int64_t i) {
    float scale[kVec];
    load_vector<T>(a.weight, wide, a.offset, 1.0f, cut.first + i, scale);
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      const float d = s[j][k] - mean, gw = g[j][k] * scale[k];
      totals[0] = fmaf(d, d, totals[0]);
      totals[1] = fmaf(gw, d, totals[1]);
      totals[2] += d;
      totals[3] += gw;
    }
  });
  sum_over<L::kThreads>(totals, shared);
  const float shift = kCentered ? totals[2] / static_cast<float>(cut.cols) : 0.0f;
  const Sums sums{mean + shift, fmaxf(totals[0] - shift * totals[2], 0.0f),
                  totals[1] - shift * totals[3], totals[3]};
  sums.store(a.pieces + 4 * static_cast<int64_t>(blockIdx.x));
}

// A run of rows within a piece's columns; its partial sums stay in registers.
template <bool kCentered, class T>
__global__ void __launch_bounds__(128) backward_apply_kernel(const NormBackward a) {
  using L = Piece<T>;
  constexpr int kVec = L::kVec;
  const Cut cut(a.cols);
  const bool wide = a.weight_dtype == DType::kFloat32;
  const float n = static_cast<float>(a.cols);
  const T* extra = static_cast<const T*>(a.grad_summed);
  Vec<float, kVec> dw[L::kSlots] = {}, db[L::kSlots] = {};
  const int64_t end = a.rows * (cut.line + 1) / a.blocks;
  for (int64_t r = a.rows * cut.line / a.blocks; r < end; ++r) {
    const int64_t start = r * a.cols + cut.first;
    const Sums sums = row_sums<kCentered>(a.pieces + 4 * r * cut.pieces, a.cols);
    const float rstd = rstd_of(sums.squares, a.cols, a.eps);
    const float slope = rstd * rstd * sums.product / n, even = kCentered ? sums.gw / n : 0.0f;
    for_vectors<L>(cut.cols, [&](int j, int64_t i) {
      float scale[kVec];
      load_vector<T>(a.weight, wide, a.offset, 1.0f, cut.first + i, scale);
      Vec<T, kVec> s, g, more = {}, out;
      s.load(static_cast<const T*>(a.x) + start + i);
      g.load(static_cast<const T*>(a.grad) + start + i);
      if (extra != nullptr) more.load(extra + start + i);
#pragma unroll
      for (int k = 0; k < kVec; ++k) {
        const float d = kCentered ? s[k] - sums.mean : s[k];
        const float gw = kCentered ? fmaf(g[k], scale[k], -even) : g[k] * scale[k];
        out.set(k, fmaf(rstd, fmaf(-d, slope, gw), more[k]));
        dw[j].v[k] = fmaf(g[k] * rstd, d, dw[j].v[k]);
        if constexpr (kCentered) db[j].v[k] += g[k];
      }
      store_wide(out, static_cast<T*>(a.dx) + start + i);
    });
  }
  const int64_t to = cut.line * a.cols + cut.first;
  for_vectors<L>(cut.cols, [&](int j, int64_t i) {
    if (a.dweight_blocks != nullptr) store_wide(dw[j], a.dweight_blocks + to + i);
    if (kCentered && a.dbias_blocks != nullptr) store_wide(db[j], a.dbias_blocks + to + i);
  });
}

template <bool kCentered, class T>
void forward_in_pieces(const NormForward& a, cudaStream_t stream) {
  const unsigned grid = static_cast<unsigned>(a.rows * norm_pieces(a.rows, a.cols));
  forward_pieces_kernel<kCentered, T><<<grid, 128, 0, stream>>>(a);
  forward_apply_kernel<kCentered, T><<<grid, 128, 0, stream>>>(a);
}

template <bool kCentered, class T>
void backward_in_pieces(const NormBackward& a, cudaStream_t stream) {
  const int64_t pieces = norm_pieces(a.rows, a.cols);
  const unsigned summed = static_cast<unsigned>(a.rows * pieces);
  const unsigned applied = static_cast<unsigned>(a.blocks * pieces);
  backward_pieces_kernel<kCentered, T><<<summed, 128, 0, stream>>>(a);
  backward_apply_kernel<kCentered, T><<<applied, 128, 0, stream>>>(a);
}

}  // namespace
}  // namespace fastlm::cuda
