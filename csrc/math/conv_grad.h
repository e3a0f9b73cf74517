// Per-sample gradients of a convolution's weight: what both backends are told.
//
//   out[b, g, m, n, tap] = sum over positions p of
//       anchor[b, g, m, p] * moving[b, g, n, p * stride - padding + tap * dilation]
//
// with zeros outside of `moving`. For a convolution the anchor is the output's gradient and the
// moving tensor the input; for a transposed one it is the other way round.
#pragma once

#include <cstdint>

namespace dpfast {

constexpr int kConvAxes = 3;  // depth, height, width; missing axes have size 1

struct ConvGrad {
  const float* anchor;   // [samples, groups * m, anchor_size...]
  const float* moving;   // [samples, groups * n, moving_size...]
  float* out;            // element (b, g, m, n, tap) at the strides below; null: not wanted
  float* anchor_sums;    // [samples, groups * m] sums over the anchor's positions, or null
  double* square_norms;  // [samples] sum of squares of a sample's gradients, or null
  std::int64_t samples, groups, m, n;
  std::int64_t anchor_size[kConvAxes], moving_size[kConvAxes], kernel[kConvAxes];
  std::int64_t stride[kConvAxes], padding[kConvAxes], dilation[kConvAxes];
  std::int64_t out_m_stride, out_n_stride;  // taps are contiguous
  bool flip_taps;                           // the last tap is written first
};

// The same sum of squares from inner products of positions alone ("ghost norms"):
//
//   square_norm[b] = sum over taps and positions p, q of
//       anchor_gram[b, p, q] * moving_gram[b, p * stride - padding + tap * dilation, likewise q]
//
// with zeros outside of `moving`. One group.
struct GhostNorm {
  const double* anchor_gram;  // [samples, anchor positions, anchor positions]
  const double* moving_gram;  // [samples, moving positions, moving positions]
  double* square_norms;       // [samples], the bound on the rounding errors added
  std::int64_t samples;
  std::int64_t m, n;  // channels, over which the inner products ran
  std::int64_t anchor_size[kConvAxes], moving_size[kConvAxes], kernel[kConvAxes];
  std::int64_t stride[kConvAxes], padding[kConvAxes], dilation[kConvAxes];
};

inline std::int64_t volume(const std::int64_t* size) { return size[0] * size[1] * size[2]; }

}  // namespace dpfast
