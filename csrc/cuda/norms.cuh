// Pass 1: norms. A warp takes one unit's part of one column chunk; a block then adds a unit's
// parts. Every sum has a fixed order, so that the bits repeat.
#pragma once

#include "cuda/block_sum.cuh"
#include "cuda/tensors.cuh"

namespace dpfast::cuda {

constexpr int kNormThreads = 256;
constexpr int kTotalThreads = 512;

struct NormTask {
  std::int64_t num_units;
  std::int64_t num_chunks;        // of the whole call
  const std::int64_t* row_order;  // null: unit u is row u
  const std::int64_t* unit_start;
  Norm norm;
  double* parts;  // [U, chunks]
};

__device__ inline double measure(double x, Norm norm) {
  return norm == Norm::kL2 ? x * x : fabs(x);
}

// One row (the common case): eight 16-byte loads in flight per lane.
template <class T>
__device__ double lane_norm_of_row(const T* row, std::int64_t length, int lane, Norm norm) {
  constexpr int kCount = 16 / sizeof(T);
  constexpr int kLoads = 8;
  using P = Pack<T, kCount>;
  double sums[kCount] = {};
  std::int64_t i = 0;
  if (is_aligned<P>(row, 0)) {
    constexpr std::int64_t kStep = kWarp * kCount;
    for (; i + kLoads * kStep <= length; i += kLoads * kStep) {
      P packs[kLoads];
#pragma unroll
      for (int l = 0; l < kLoads; ++l) {
        packs[l] = *reinterpret_cast<const P*>(row + i + l * kStep + lane * kCount);
      }
#pragma unroll
      for (int l = 0; l < kLoads; ++l) {
#pragma unroll
        for (int v = 0; v < kCount; ++v) sums[v] += measure(to_double(packs[l].values[v]), norm);
      }
    }
  }
  for (i += lane; i < length; i += kWarp) sums[0] += measure(to_double(row[i]), norm);
  double total = 0.0;
#pragma unroll
  for (int v = 0; v < kCount; ++v) total += sums[v];
  return total;
}

// Several rows: they are added before they are measured.
template <class T>
__device__ double lane_norm_of_rows(const T* first_column, std::int64_t row_stride,
                                    const std::int64_t* rows, std::int64_t num_rows,
                                    std::int64_t length, int lane, Norm norm) {
  double total = 0.0;
  for (std::int64_t i = lane; i < length; i += kWarp) {
    double x = 0.0;
#pragma unroll 4
    for (std::int64_t r = 0; r < num_rows; ++r) {
      x += to_double(first_column[rows[r] * row_stride + i]);
    }
    total += measure(x, norm);
  }
  return total;
}

template <class T>
__global__ void __launch_bounds__(kNormThreads)
    part_norms_kernel(const __grid_constant__ TensorBatch batch, const NormTask task) {
  const int lane = threadIdx.x % kWarp;
  const std::int64_t num_warps = static_cast<std::int64_t>(gridDim.x) * (kNormThreads / kWarp);
  const std::int64_t tasks = batch.num_tiles * task.num_units;  // a tile is a chunk here
  for (std::int64_t i = blockIdx.x * (kNormThreads / kWarp) + threadIdx.x / kWarp; i < tasks;
       i += num_warps) {
    const std::int64_t tile = i / task.num_units;
    const std::int64_t unit = i % task.num_units;
    const TensorSlice& slice = slice_of_tile(batch, tile);
    const std::int64_t chunk = tile - slice.first_tile;
    const std::int64_t start = chunk * kChunk;
    const std::int64_t length = slice.numel - start < kChunk ? slice.numel - start : kChunk;
    const T* column = static_cast<const T*>(slice.grad) + start;
    double sum;
    if (task.unit_start == nullptr) {
      sum = lane_norm_of_row(column + unit * slice.row_stride, length, lane, task.norm);
    } else {
      const std::int64_t begin = task.unit_start[unit];
      const std::int64_t num_rows = task.unit_start[unit + 1] - begin;
      if (num_rows == 1) {
        sum = lane_norm_of_row(column + task.row_order[begin] * slice.row_stride, length, lane,
                               task.norm);
      } else {
        sum = lane_norm_of_rows(column, slice.row_stride, task.row_order + begin, num_rows, length,
                                lane, task.norm);
      }
    }
    sum = warp_sum(sum);
    if (lane == 0) task.parts[unit * task.num_chunks + slice.first_chunk + chunk] = sum;
  }
}

struct TotalTask {
  const double* parts;  // [U, chunks]
  std::int64_t num_units;
  std::int64_t num_chunks;
  const std::int64_t* unit_start;
  bool average_rows;
  Norm norm;
  double* norms;  // [G, U]
};

__device__ inline double finish_norm(const TotalTask& task, std::int64_t unit, double sum) {
  double norm = task.norm == Norm::kL2 ? sqrt(sum) : sum;
  if (task.unit_start != nullptr) {
    const std::int64_t rows = task.unit_start[unit + 1] - task.unit_start[unit];
    if (task.average_rows) norm /= static_cast<double>(rows);
    if (rows == 0) norm = nan("");
  }
  return norm;
}

// One threshold for all tensors: a block adds all chunks of a unit.
__global__ void __launch_bounds__(kTotalThreads) total_norms_kernel(const TotalTask task) {
  __shared__ double warp_sums[kTotalThreads / kWarp];
  for (std::int64_t unit = blockIdx.x; unit < task.num_units; unit += gridDim.x) {
    const double* parts = task.parts + unit * task.num_chunks;
    double sum = 0.0;
#pragma unroll 4
    for (std::int64_t c = threadIdx.x; c < task.num_chunks; c += kTotalThreads) sum += parts[c];
    sum = warp_sum(sum);
    if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
      double total = 0.0;
      for (int w = 0; w < kTotalThreads / kWarp; ++w) total += warp_sums[w];
      task.norms[unit] = finish_norm(task, unit, total);
    }
    __syncthreads();
  }
}

// One threshold per tensor: a warp adds one unit's chunks of one tensor.
__global__ void __launch_bounds__(kNormThreads)
    group_norms_kernel(const __grid_constant__ TensorBatch batch, const TotalTask task) {
  const int lane = threadIdx.x % kWarp;
  const std::int64_t num_warps = static_cast<std::int64_t>(gridDim.x) * (kNormThreads / kWarp);
  for (std::int64_t i = blockIdx.x * (kNormThreads / kWarp) + threadIdx.x / kWarp;
       i < batch.count * task.num_units; i += num_warps) {
    const TensorSlice& slice = batch.slices[i / task.num_units];
    const std::int64_t unit = i % task.num_units;
    const double* parts = task.parts + unit * task.num_chunks + slice.first_chunk;
    double sum = 0.0;
    for (std::int64_t c = lane; c < (slice.numel + kChunk - 1) / kChunk; c += kWarp) {
      sum += parts[c];
    }
    sum = warp_sum(sum);
    if (lane == 0) {
      task.norms[slice.group * task.num_units + unit] = finish_norm(task, unit, sum);
    }
  }
}

}  // namespace dpfast::cuda
