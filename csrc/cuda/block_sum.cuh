// Sums over a warp and over a block, in a fixed order.
#pragma once

#include <cuda_runtime.h>

namespace dpfast::cuda {

constexpr int kWarp = 32;

__device__ inline double warp_sum(double x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    x += __shfl_xor_sync(0xffffffffu, x, offset);
  }
  return x;
}

// The sum of all threads' values, the same in all of them. Once per kernel: its shared memory is
// not protected against a second call.
template <int kThreads>
__device__ inline double block_sum(double value) {
  __shared__ double warps[kThreads / kWarp];
  value = warp_sum(value);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = 0.0;
  for (int warp = 0; warp < kThreads / kWarp; ++warp) value += warps[warp];
  return value;
}

}  // namespace dpfast::cuda
