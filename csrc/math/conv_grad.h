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
  float* out;            // element (b, g, m, n, tap) at the strides below; null: only norms
  float* anchor_sums;    // [samples, groups * m] sums over the anchor's positions, or null
  double* square_norms;  // [samples] sum of squares of a sample's gradients, or null
  std::int64_t samples, groups, m, n;
  std::int64_t anchor_size[kConvAxes], moving_size[kConvAxes], kernel[kConvAxes];
  std::int64_t stride[kConvAxes], padding[kConvAxes], dilation[kConvAxes];
  std::int64_t out_m_stride, out_n_stride;  // taps are contiguous
  bool flip_taps;                           // the last tap is written first
};

inline std::int64_t volume(const std::int64_t* size) { return size[0] * size[1] * size[2]; }

}  // namespace dpfast
