// Kernels of conv_grad: per-sample weight gradients of convolutions as matrix products, one per
// sample and group (an image): rows are the anchor's channels, columns are (n, tap), and the
// contraction runs over positions. The columns are gathered while a tile is filled.
//
// Every sum has a fixed order and there are no atomics: the bits repeat. They depend on the number
// of multiprocessors, which decides how positions are split.
#pragma once

#include "cuda/block_sum.cuh"
#include "cuda/conv_grad_tiles.cuh"

namespace dpfast::cuda {

// On a processor at once; up to 168 registers each. Left alone, the compiler spills to fit more.
constexpr int kThreadsAtLeast = 384;
constexpr int kSplitThreads = 256;
constexpr int kSplitElements = 4 * kSplitThreads;  // of a sample's gradients, per block
constexpr int kFinishThreads = 128;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

// One tile row: at most 32 values in float32, four sums side by side.
template <class T>
__device__ inline double row_sum(const T* row) {
  constexpr int kCount = 16 / static_cast<int>(sizeof(T));
  struct alignas(16) Quarter {
    T values[kCount];
  };
  float sums[4] = {};
#pragma unroll
  for (int q = 0; q < kRowBytes / 16; ++q) {
    const Quarter quarter = reinterpret_cast<const Quarter*>(row)[q];
#pragma unroll
    for (int v = 0; v < kCount; ++v) sums[v % 4] += to_float(quarter.values[v]);
  }
  return static_cast<double>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Where an image's gradient (m, column) lies in its part of `out`.
__device__ inline int place_of(const ConvTask& task, int m, int column) {
  const int n = task.by_taps.divide(column);
  const int tap = column - n * task.taps;
  return m * task.out_m_stride + n * task.out_n_stride +
         (task.flip_taps ? task.taps - 1 - tap : tap);
}

// A block takes one tile of one image's gradients over one split of the positions.
template <class Form>
__global__ void __launch_bounds__(Form::Tile::kThreads, kThreadsAtLeast / Form::Tile::kThreads)
    conv_grad_kernel(const __grid_constant__ ConvTask task) {
  using Tile = typename Form::Tile;
  using T = typename Tile::Value;
  static_assert(Tile::kM <= Tile::kThreads, "a thread per row sums the anchor");
  alignas(16) __shared__ T tiles[2][Tile::kElements];
  __shared__ ConvColumn columns[Tile::kN];

  // Neighbouring blocks share positions of one image: they meet in L2.
  const int tile_m = static_cast<int>(blockIdx.x) % task.tiles_m;
  int rest = static_cast<int>(blockIdx.x) / task.tiles_m;
  const int tile_n = rest % task.tiles_n;
  rest /= task.tiles_n;
  const int split = rest % task.splits;
  const std::int64_t image = rest / task.splits;
  const int first_m = tile_m * Tile::kM;
  const int first_column = tile_n * Tile::kN;
  const int begin = split * task.split_positions;
  const int end =
      task.positions - begin < task.split_positions ? task.positions : begin + task.split_positions;

  for (int i = threadIdx.x; i < Tile::kN; i += Tile::kThreads) {
    columns[i] = make_column(task, first_column + i, static_cast<int>(sizeof(T)));
  }
  __syncthreads();

  const std::int64_t moving_elements = static_cast<std::int64_t>(task.n) * task.moving_size[0] *
                                       task.moving_size[1] * task.moving_size[2];
  ConvLoader<Tile> loader(
      task, static_cast<const T*>(task.anchor) + (image * task.m + first_m) * task.positions,
      static_cast<const T*>(task.moving) + image * moving_elements, task.m - first_m, end, columns);
  const int row = static_cast<int>(threadIdx.x);
  const bool sums_row = task.anchor_sums != nullptr && tile_n == 0 && row < Tile::kM;
  double row_total = 0.0;
  Form form;
  if (begin < end) {
    loader.begin(begin, tiles[0]);
    loader.end(begin, tiles[0]);
  }
  int current = 0;
  for (int first = begin; first < end; first += kPositions<T>) {
    wait_for_copies();
    __syncthreads();  // this tile is complete, and the other one has been read
    const int next = first + kPositions<T>;
    if (next < end) loader.begin(next, tiles[1 - current]);
    form.multiply(tiles[current]);
    if (sums_row) row_total += row_sum(tiles[current] + row * kPitch<T>);
    if (next < end) loader.end(next, tiles[1 - current]);
    current = 1 - current;
  }

  if (sums_row && first_m + row < task.m) {
    const std::int64_t at = image * task.m + first_m + row;
    if (task.partials == nullptr) {
      task.anchor_sums[at] = static_cast<float>(row_total);
    } else {
      task.sum_partials[split * task.images * task.m + at] = row_total;
    }
  }
  double squares = 0.0;
  const bool partial = task.partials != nullptr;
  float* to = partial ? task.partials + split * task.images * task.m * task.columns : task.out;
  if (to != nullptr) to += image * task.m * task.columns;
  form.for_each([&](int tile_row, int tile_column, float sum) {
    const int m = first_m + tile_row;
    const int column = first_column + tile_column;
    if (m >= task.m || column >= task.columns) return;
    if (to != nullptr) to[place_of(task, m, column)] = sum;
    squares += static_cast<double>(sum) * static_cast<double>(sum);
  });
  if (task.squares == nullptr || partial) return;
  squares = block_sum<Tile::kThreads>(squares);
  if (threadIdx.x == 0) {
    const std::int64_t sample = image / task.groups;
    const int group = static_cast<int>(image % task.groups);
    task.squares[sample * task.square_parts + (group * task.tiles_n + tile_n) * task.tiles_m +
                 tile_m] = squares;
  }
}

// Where positions are split: a block adds kSplitElements of one sample's gradients over the splits,
// in float64 and in their order, and rounds once.
__global__ void __launch_bounds__(kSplitThreads)
    conv_grad_splits_kernel(const __grid_constant__ ConvTask task, const int blocks) {
  const std::int64_t sample = static_cast<int>(blockIdx.x) / blocks;
  const int part = static_cast<int>(blockIdx.x) % blocks;
  const std::int64_t elements = static_cast<std::int64_t>(task.groups) * task.m * task.columns;
  const std::int64_t all = task.images * task.m * task.columns;
  double squares = 0.0;
  for (int i = 0; i < kSplitElements / kSplitThreads; ++i) {
    const std::int64_t at = static_cast<std::int64_t>(part) * kSplitElements + i * kSplitThreads +
                            static_cast<int>(threadIdx.x);
    if (at >= elements) break;
    const float* partials = task.partials + sample * elements + at;
    double sum = 0.0;
#pragma unroll 4
    for (int split = 0; split < task.splits; ++split) {
      sum += static_cast<double>(partials[split * all]);
    }
    const float value = static_cast<float>(sum);
    if (task.out != nullptr) task.out[sample * elements + at] = value;
    squares += static_cast<double>(value) * static_cast<double>(value);
  }
  if (task.squares == nullptr) return;
  squares = block_sum<kSplitThreads>(squares);
  if (threadIdx.x == 0) task.squares[sample * task.square_parts + part] = squares;
}

// The anchor's sums over the splits; a thread per channel of a sample.
__global__ void __launch_bounds__(kSplitThreads)
    conv_grad_anchor_sums_kernel(const __grid_constant__ ConvTask task) {
  const std::int64_t all = task.images * task.m;
  const std::int64_t at =
      static_cast<std::int64_t>(blockIdx.x) * kSplitThreads + static_cast<int>(threadIdx.x);
  if (at >= all) return;
  double sum = 0.0;
  for (int split = 0; split < task.splits; ++split) sum += task.sum_partials[split * all + at];
  task.anchor_sums[at] = static_cast<float>(sum);
}

// square_norms[sample] from its parts; a block per sample.
__global__ void __launch_bounds__(kFinishThreads)
    conv_grad_norms_kernel(const double* squares, const int parts, double* square_norms) {
  const std::int64_t sample = static_cast<int>(blockIdx.x);
  double sum = 0.0;
  for (int part = static_cast<int>(threadIdx.x); part < parts; part += kFinishThreads) {
    sum += squares[sample * parts + part];
  }
  sum = block_sum<kFinishThreads>(sum);
  if (threadIdx.x == 0) square_norms[sample] = sum;
}

}  // namespace dpfast::cuda
