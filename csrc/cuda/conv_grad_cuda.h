// Per-sample weight gradients of convolutions on CUDA. See math/conv_grad.h for what is computed.
#pragma once

#include <cstdint>

#include "math/clip_and_noise.h"
#include "math/conv_grad.h"

namespace dpfast::cuda {

struct ConvGradOptions {
  DType dtype;  // of anchor and moving: float32, bfloat16 or float16; out is float32 always
  // float32 factors may be rounded to TF32. Not where only norms are wanted: a norm must belong to
  // the values that are used (norms of what is stored are always of the stored values).
  bool allow_tf32;
  void* workspace;  // of conv_grad_workspace_bytes(...), aligned to 8 bytes
};

// Throws std::invalid_argument where a sample or the call has too many elements for the kernels.
std::int64_t conv_grad_workspace_bytes(const ConvGrad& conv, const ConvGradOptions& options,
                                       int device);

// Enqueues the call on the stream: no allocation, no copy to the host, no synchronisation. Needs
// compute capability 8.0. Throws std::runtime_error where a launch fails.
void conv_grad(const ConvGrad& conv, const ConvGradOptions& options, int device, void* stream);

}  // namespace dpfast::cuda
