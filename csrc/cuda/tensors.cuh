// The tensors of one launch as kernel parameters, and how their elements are read.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "math/clip_and_noise.h"

namespace dpfast::cuda {

struct TensorSlice {
  const void* grad;
  void* out;
  std::int64_t row_stride;
  std::int64_t numel;
  std::int64_t first_chunk;  // of this tensor, among all chunks of the call
  std::int64_t first_tile;   // of this tensor, among the tiles of this launch
  std::int32_t group;
  std::uint32_t index;  // of this tensor, in the noise's nonce
  bool summed;          // one row, of weight 1
};

// Kernel parameters hold 4 KB, and 32,764 bytes from CUDA 12.1 on: hundreds of small tensors go
// in one launch, without a copy that could outlive its source.
#if CUDART_VERSION >= 12010
constexpr int kTensorsPerLaunch = 480;
#else
constexpr int kTensorsPerLaunch = 56;
#endif

struct TensorBatch {
  TensorSlice slices[kTensorsPerLaunch];
  int count;
  std::int64_t num_tiles;
};

// The slice that holds a tile: the last whose first_tile is not above it.
__device__ inline const TensorSlice& slice_of_tile(const TensorBatch& batch, std::int64_t tile) {
  int low = 0;
  int high = batch.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (batch.slices[middle].first_tile <= tile) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return batch.slices[low];
}

__device__ inline double to_double(double x) { return x; }
__device__ inline double to_double(float x) { return static_cast<double>(x); }
__device__ inline double to_double(__nv_bfloat16 x) {
  return static_cast<double>(__bfloat162float(x));
}
__device__ inline double to_double(__half x) { return static_cast<double>(__half2float(x)); }

// kCount neighbouring elements, read in accesses of at most 16 bytes.
template <class T, int kCount>
struct alignas(kCount * sizeof(T) < 16 ? kCount * sizeof(T) : 16) Pack {
  T values[kCount];
};

template <class P>
__device__ inline bool is_aligned(const void* base, std::int64_t stride_bytes) {
  return (reinterpret_cast<std::uintptr_t>(base) | static_cast<std::uintptr_t>(stride_bytes)) %
             alignof(P) ==
         0;
}

template <class T>
struct OutputOf {
  using type = float;
};
template <>
struct OutputOf<double> {
  using type = double;
};

}  // namespace dpfast::cuda
