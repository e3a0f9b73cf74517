// Pass 3: weighted sum over the rows, noise, division. A block owns a tile of columns; a thread
// owns 16 of them in four packs, walks the rows and writes once. Tiles run downwards: what pass 1
// read last is still in L2.
#pragma once

#include "cuda/weights.cuh"

namespace dpfast::cuda {

constexpr int kSumThreads = 128;
constexpr int kPackColumns = 4;
constexpr int kPacks = 4;
constexpr int kTile = kSumThreads * kPackColumns * kPacks;  // 2,048 columns
constexpr int kTileGroups = kTile / math::kNoiseGroup;      // 8: one ChaCha20 block a thread
constexpr int kPaddedGroup = math::kNoiseGroup + 16;        // no bank conflict between groups
constexpr int kRowsAtOnce = 4;
static_assert(kTileGroups * math::kNoiseLanes == kSumThreads, "one block of noise a thread");

struct SumTask {
  std::int64_t num_units;
  const std::int64_t* row_order;  // null: unit u is row u
  const std::int64_t* unit_start;
  const double* weights;  // [G, U], of the sum of a unit's rows
  const double* scales;   // [G]
  const Release* release;
  math::Mechanism mechanism;  // kNone: no noise
  bool accumulate;
};

__device__ inline void noise_of_thread(const SumTask& task, std::uint32_t tensor,
                                       std::uint32_t block, float out[math::kChaChaWords]) {
  if (task.mechanism == math::Mechanism::kGaussian) {
    math::noise_block<math::Gaussian, math::ScalarOps>(task.release->stream, tensor, block, out);
  } else {
    math::noise_block<math::Laplace, math::ScalarOps>(task.release->stream, tensor, block, out);
  }
}

__device__ inline void noise_of_thread(const SumTask& task, std::uint32_t tensor,
                                       std::uint32_t block, double out[math::kChaChaWords]) {
  std::uint32_t high[math::kChaChaWords], low[math::kChaChaWords];
  math::noise_words<math::ScalarOps>(task.release->stream, tensor, block, high);
  math::noise_words<math::ScalarOps>(task.release->stream, tensor | math::kExtensionBit, block,
                                     low);
#pragma unroll
  for (int w = 0; w < math::kChaChaWords; w += 2) {
    if (task.mechanism == math::Mechanism::kGaussian) {
      math::gaussian_pair_double(math::join_words(high[w], low[w]),
                                 math::join_words(high[w + 1], low[w + 1]), out + w);
    } else {
      out[w] = math::laplace_double(high[w], low[w]);
      out[w + 1] = math::laplace_double(high[w + 1], low[w + 1]);
    }
  }
}

// One ChaCha20 block (16 samples) a thread, into shared memory in the order of the columns.
template <class Out>
__device__ inline void fill_noise(const SumTask& task, std::uint32_t tensor, std::int64_t start,
                                  std::int64_t length, Out* noise) {
  const int group = threadIdx.x / math::kNoiseLanes;
  const int lane = threadIdx.x % math::kNoiseLanes;
  if (group * math::kNoiseGroup >= length) return;
  Out samples[math::kChaChaWords];
  noise_of_thread(
      task, tensor,
      static_cast<std::uint32_t>((start / math::kNoiseGroup + group) * math::kNoiseLanes + lane),
      samples);
#pragma unroll
  for (int w = 0; w < math::kChaChaWords; ++w) {
    noise[group * kPaddedGroup + w * math::kNoiseLanes + lane] = samples[w];
  }
}

template <class T>
using Columns = Pack<T, kPackColumns>;

// A weight of exactly 0 marks a dropped row: it may hold NaN, so it is never multiplied.
template <class T>
__device__ inline void add_columns(const Columns<T>& x, double weight, double sums[kPackColumns]) {
  if (weight == 0.0) return;
#pragma unroll
  for (int v = 0; v < kPackColumns; ++v) sums[v] += weight * to_double(x.values[v]);
}

template <class T>
__device__ inline Columns<T> load_columns(const T* row, std::int64_t column, std::int64_t length,
                                          bool aligned) {
  Columns<T> x;
  if (aligned && column + kPackColumns <= length) {
    x = *reinterpret_cast<const Columns<T>*>(row + column);
  } else {
#pragma unroll
    for (int v = 0; v < kPackColumns; ++v) {
      x.values[v] = column + v < length ? row[column + v] : T(0.0f);
    }
  }
  return x;
}

// A whole, aligned tile: 16 loads of up to 16 bytes in flight a thread, no bounds to check.
template <class T>
__device__ inline void add_whole_rows(const T* top, std::int64_t row_stride, int rows,
                                      const double* weights, double sums[kPacks][kPackColumns]) {
  const T* mine = top + threadIdx.x * kPackColumns;
  int r = 0;
  for (; r + kRowsAtOnce <= rows; r += kRowsAtOnce) {
    Columns<T> x[kRowsAtOnce][kPacks];
#pragma unroll
    for (int k = 0; k < kRowsAtOnce; ++k) {
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        x[k][p] = *reinterpret_cast<const Columns<T>*>(mine + (r + k) * row_stride +
                                                       p * kSumThreads * kPackColumns);
      }
    }
#pragma unroll
    for (int k = 0; k < kRowsAtOnce; ++k) {
#pragma unroll
      for (int p = 0; p < kPacks; ++p) add_columns(x[k][p], weights[r + k], sums[p]);
    }
  }
  for (; r < rows; ++r) {
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      add_columns(*reinterpret_cast<const Columns<T>*>(mine + r * row_stride +
                                                       p * kSumThreads * kPackColumns),
                  weights[r], sums[p]);
    }
  }
}

template <class T>
__device__ inline void add_ragged_rows(const T* top, std::int64_t row_stride, int rows,
                                       std::int64_t length, bool aligned, const double* weights,
                                       double sums[kPacks][kPackColumns]) {
#pragma unroll 1
  for (int r = 0; r < rows; ++r) {
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const std::int64_t column = (p * kSumThreads + threadIdx.x) * kPackColumns;
      if (column >= length) continue;
      add_columns(load_columns(top + r * row_stride, column, length, aligned), weights[r], sums[p]);
    }
  }
}

// Units of several rows: the rows are added before they are weighted (see clip_and_noise.h).
template <class T>
__device__ inline void add_units(const SumTask& task, const T* grad, std::int64_t row_stride,
                                 std::int64_t length, bool aligned, const double* weights,
                                 double sums[kPacks][kPackColumns]) {
#pragma unroll 1
  for (std::int64_t u = 0; u < task.num_units; ++u) {
    const double weight = weights[u];
    if (weight == 0.0) continue;  // dropped
    const std::int64_t begin = task.unit_start[u];
    const std::int64_t end = task.unit_start[u + 1];
    if (begin == end) continue;  // an empty slot
    double unit[kPacks][kPackColumns] = {};
#pragma unroll 2
    for (std::int64_t i = begin; i < end; ++i) {
      const T* row = grad + task.row_order[i] * row_stride;
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        const std::int64_t column = (p * kSumThreads + threadIdx.x) * kPackColumns;
        if (column < length) {
          const Columns<T> x = load_columns(row, column, length, aligned);
#pragma unroll
          for (int v = 0; v < kPackColumns; ++v) unit[p][v] += to_double(x.values[v]);
        }
      }
    }
    // A unit of one row is taken as without units, so that the two give the same bits.
    const double used = end - begin == 1 && sizeof(T) < 8 ? math::short_weight(weight) : weight;
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
#pragma unroll
      for (int v = 0; v < kPackColumns; ++v) sums[p][v] += used * unit[p][v];
    }
  }
}

// Rows that are units of their own, with their weights in shared memory.
template <class T>
__device__ inline void add_rows(const SumTask& task, const T* grad, std::int64_t row_stride,
                                std::int64_t length, bool aligned, const double* all_weights,
                                double* weights, double sums[kPacks][kPackColumns]) {
  const int t = threadIdx.x;
  for (std::int64_t first = 0; first < task.num_units; first += kSumThreads) {
    __syncthreads();
    if (first + t < task.num_units) {
      const double weight = all_weights[first + t];
      weights[t] = sizeof(T) == sizeof(double) ? weight : math::short_weight(weight);
    }
    __syncthreads();
    const std::int64_t left = task.num_units - first;
    const int rows = static_cast<int>(left < kSumThreads ? left : kSumThreads);
    const T* top = grad + first * row_stride;
    if (aligned && length == kTile) {
      add_whole_rows(top, row_stride, rows, weights, sums);
    } else {
      add_ragged_rows(top, row_stride, rows, length, aligned, weights, sums);
    }
  }
}

// kUnits: rows are grouped into units.
template <class T, bool kUnits>
__global__ void __launch_bounds__(kSumThreads)
    weighted_sum_kernel(const __grid_constant__ TensorBatch batch, const SumTask task) {
  using Out = typename OutputOf<T>::type;
  __shared__ double weights[kSumThreads];
  __shared__ Out noise[kTileGroups * kPaddedGroup];
  const int t = threadIdx.x;
  for (std::int64_t i = blockIdx.x; i < batch.num_tiles; i += gridDim.x) {
    const std::int64_t tile = batch.num_tiles - 1 - i;
    const TensorSlice& slice = slice_of_tile(batch, tile);
    const std::int64_t start = (tile - slice.first_tile) * kTile;
    const std::int64_t length = slice.numel - start < kTile ? slice.numel - start : kTile;
    const T* grad = static_cast<const T*>(slice.grad) + start;
    const bool aligned =
        is_aligned<Columns<T>>(grad, slice.row_stride * static_cast<std::int64_t>(sizeof(T)));

    // The noise comes first: its words and the sums are never in registers together, and while
    // one block computes, its neighbours on the processor wait for memory.
    __syncthreads();  // the last tile's noise and weights have been read
    if (task.mechanism != math::Mechanism::kNone) {
      fill_noise(task, slice.index, start, length, noise);
    }

    double sums[kPacks][kPackColumns] = {};
    const double* unit_weights = task.weights + slice.group * task.num_units;
    if (slice.summed) {
      if (t == 0) weights[0] = 1.0;
      __syncthreads();
      add_ragged_rows(grad, 0, 1, length, aligned, weights, sums);
    } else if (kUnits) {
      add_units(task, grad, slice.row_stride, length, aligned, unit_weights, sums);
    } else {
      add_rows(task, grad, slice.row_stride, length, aligned, unit_weights, weights, sums);
    }

    __syncthreads();  // the noise is complete, also where there are no rows
    Out* out = static_cast<Out*>(slice.out) + start;
    const double scale = task.scales[slice.group];
    const double factor = task.release->factor;
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int column = (p * kSumThreads + t) * kPackColumns;
#pragma unroll
      for (int v = 0; v < kPackColumns; ++v) {
        const int c = column + v;
        if (c >= length) continue;
        double value = sums[p][v];
        if (task.accumulate && !slice.summed) value += static_cast<double>(out[c]);
        if (task.mechanism != math::Mechanism::kNone) {
          value += scale * static_cast<double>(
                               noise[c / math::kNoiseGroup * kPaddedGroup + c % math::kNoiseGroup]);
        }
        out[c] = static_cast<Out>(value * factor);
      }
    }
  }
}

}  // namespace dpfast::cuda
