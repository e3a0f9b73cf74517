// The gradient goes back along the index that the forward pass has left. Floor: the output's
// gradient and the index read once, the input's gradient written once.
//
// No two additions may meet, and each sum must have one order. A warp owns a tile of the input's
// gradient, in shared memory, and looks through all outputs within reach of it, row by row, 32 at a
// time in their order. Where several of these took the same element they are added one after the
// other, by lane. So there are no atomics, and each sum has the order of the outputs (under the
// border "wrap" the outputs within reach begin in another place, and so does that order).
//
// What this costs: an output is looked at by each tile within its reach. Of most of these looks
// only the index is read, from the cache. Fixed-point sums by atomics would look once, but would
// write and read 16 bytes more per element, need the largest gradient first, and have no place
// for Inf and NaN.
#include <cuda_runtime.h>

#include <algorithm>
#include <limits>
#include <stdexcept>

#include "cuda/launch.cuh"
#include "cuda/morphology_cuda.h"
#include "cuda/morphology_items.cuh"
#include "math/source_index.h"

namespace dpfast::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kWarpsPerBlock = 4;
constexpr int kBackwardThreads = kWarp * kWarpsPerBlock;
constexpr int kSteps = 4;  // of 32 outputs whose index is read at a time
constexpr unsigned kAllLanes = 0xffffffffu;
// Tiles of a multiprocessor below which smaller ones, though more is looked at, are the faster.
constexpr int kWarpTilesPerProcessor = 16;

// Quotients of numbers below 2^31 by one that stays the same.
struct Divisor {
  std::uint32_t multiplier;
  int shift;
};

Divisor divisor_of(std::int64_t d) {
  int log = 0;
  while ((std::int64_t{1} << log) < d) ++log;
  const std::uint64_t power = std::uint64_t{1} << (31 + log);
  return {static_cast<std::uint32_t>(power / static_cast<std::uint64_t>(d) + 1), 31 + log};
}

__device__ inline int quotient(int n, Divisor by) {
  const std::uint64_t product =
      static_cast<std::uint64_t>(static_cast<std::uint32_t>(n)) * by.multiplier;
  return static_cast<int>(product >> by.shift);
}

struct BackwardTask {
  int size[kSpatialAxes], tile[kSpatialAxes], tiles[kSpatialAxes];
  int reach[kSpatialAxes];
  bool wrap;
  Divisor by_row, by_plane;
  std::int64_t num_tiles;  // of all channels
  std::int64_t batch, channels, first, count;
  const void* grad_output;
  const void* index;
  SourceIndex source;
  void* grad_input;
  // Bit t of a program's terms: whether they have an index, and their signs.
  std::uint64_t moves, negative;
  int terms;
};

// Outputs along an axis within reach of a tile: `count` positions from `first`, cyclically.
struct Outputs {
  int first, count;
};

__device__ inline Outputs outputs_of(const BackwardTask& task, int axis, int origin, int extent) {
  const std::int64_t n = task.size[axis], reach = task.reach[axis];
  if (task.wrap) {
    if (extent + 2 * reach >= n) return {0, static_cast<int>(n)};
    return {static_cast<int>((origin - reach + n) % n), static_cast<int>(extent + 2 * reach)};
  }
  const std::int64_t low = origin - reach > 0 ? origin - reach : 0;
  const std::int64_t high = origin + extent + reach < n ? origin + extent + reach : n;
  return {static_cast<int>(low), static_cast<int>(high - low)};
}

__device__ inline int position_of(const Outputs& outputs, int i, int n) {
  const std::int64_t position = std::int64_t{outputs.first} + i;  // below 2 n
  return static_cast<int>(position >= n ? position - n : position);
}

// A tile of the input's gradient, in its place.
struct TileOfSums {
  int origin[kSpatialAxes], extent[kSpatialAxes];

  // Of element `at` of the channel; -1: in another tile.
  __device__ int place(const BackwardTask& task, int at) const {
    const int plane = task.size[0] == 1 ? 0 : quotient(at, task.by_plane);
    at -= plane * task.size[1] * task.size[2];
    const int row = quotient(at, task.by_row);
    const int d = plane - origin[0], h = row - origin[1], w = at - row * task.size[2] - origin[2];
    const bool inside =
        d >= 0 && d < extent[0] && h >= 0 && h < extent[1] && w >= 0 && w < extent[2];
    return inside ? (d * extent[1] + h) * extent[2] + w : -1;
  }
};

// sums[place] += value of all lanes whose place is not negative, in the order of the lanes.
template <class Sum>
__device__ void add_in_order(Sum* sums, int place, Sum value, int lane) {
  if (__ballot_sync(kAllLanes, place >= 0) == 0) return;
  const unsigned same = __match_any_sync(kAllLanes, place);
  const int rank = __popc(same & ((1u << lane) - 1u));
  for (int round = 0; __ballot_sync(kAllLanes, place >= 0 && rank >= round) != 0; ++round) {
    if (place >= 0 && rank == round) sums[place] += value;
    __syncwarp();
  }
}

template <class T, class Index, class Sum>
__device__ void collect(const BackwardTask& task, const TileOfSums& tile, const T* grad,
                        const Index* index, Sum sign, int lane, Sum* sums) {
  constexpr Index kNoSource = sizeof(Index) == 2 ? INT16_MIN : INT32_MIN;
  Outputs outputs[kSpatialAxes];
  for (int axis = 0; axis < kSpatialAxes; ++axis) {
    outputs[axis] = outputs_of(task, axis, tile.origin[axis], tile.extent[axis]);
  }
  const std::int64_t rows = std::int64_t{outputs[0].count} * outputs[1].count;
  for (std::int64_t r = 0; r < rows; ++r) {
    const int d = position_of(outputs[0], static_cast<int>(r / outputs[1].count), task.size[0]);
    const int h = position_of(outputs[1], static_cast<int>(r % outputs[1].count), task.size[1]);
    const int row = (d * task.size[1] + h) * task.size[2];
    for (std::int64_t begin = 0; begin < outputs[2].count; begin += kSteps * kWarp) {
      int at[kSteps], place[kSteps];
      Index stored[kSteps];
      Sum value[kSteps];
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        const std::int64_t i = begin + s * kWarp + lane;
        const bool there = i < outputs[2].count;
        at[s] = row + position_of(outputs[2], there ? static_cast<int>(i) : 0, task.size[2]);
        stored[s] = there ? index[at[s]] : kNoSource;
      }
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        const int source = at[s] + math::source_distance(task.source, stored[s]);
        place[s] = stored[s] == kNoSource ? -1 : tile.place(task, source);
        value[s] = place[s] < 0 ? Sum{0} : sign * widen(grad[at[s]]);
      }
#pragma unroll
      for (int s = 0; s < kSteps; ++s) add_in_order(sums, place[s], value[s], lane);
    }
  }
}

// Calls take(place, element) for all of a tile, rows by the warp's lanes.
template <class Take>
__device__ void for_each_element(const BackwardTask& task, const TileOfSums& tile, int lane,
                                 const Take& take) {
  const int* extent = tile.extent;
  for (int i = lane; i < extent[0] * extent[1] * extent[2]; i += kWarp) {
    const int w = i % extent[2], h = i / extent[2] % extent[1], d = i / extent[2] / extent[1];
    take(i, ((tile.origin[0] + d) * task.size[1] + tile.origin[1] + h) * task.size[2] +
                tile.origin[2] + w);
  }
}

template <class T, class Index, class Sum>
__global__ __launch_bounds__(kBackwardThreads) void morphology_backward_kernel(
    const __grid_constant__ BackwardTask task) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  Sum* const sums = reinterpret_cast<Sum*>(dynamic_shared()) +
                    std::int64_t{warp} * task.tile[0] * task.tile[1] * task.tile[2];
  const std::int64_t volume = std::int64_t{task.size[0]} * task.size[1] * task.size[2];
  // Warps do not wait for one another: no barrier of the block in here.
  for (std::int64_t t = std::int64_t{blockIdx.x} * kWarpsPerBlock + warp; t < task.num_tiles;
       t += std::int64_t{gridDim.x} * kWarpsPerBlock) {
    TileOfSums tile;
    std::int64_t left = t;
    for (int axis = kSpatialAxes - 1; axis >= 0; --axis) {
      tile.origin[axis] = static_cast<int>(left % task.tiles[axis]) * task.tile[axis];
      left /= task.tiles[axis];
      const int rest = task.size[axis] - tile.origin[axis];
      tile.extent[axis] = rest < task.tile[axis] ? rest : task.tile[axis];
    }
    const std::int64_t channel = left / task.count * task.channels + task.first + left % task.count;
    const T* grad = static_cast<const T*>(task.grad_output) + channel * volume;
    const Index* index = static_cast<const Index*>(task.index) + channel * volume;
    for_each_element(task, tile, lane, [&](int place, int) { sums[place] = Sum{0}; });
    __syncwarp();
    for (int term = 0; term < task.terms; ++term) {
      const Sum sign = (task.negative >> term & 1) != 0 ? Sum{-1} : Sum{1};
      if ((task.moves >> term & 1) == 0) {
        for_each_element(task, tile, lane,
                         [&](int place, int at) { sums[place] += sign * widen(grad[at]); });
      } else {
        collect(task, tile, grad, index, sign, lane, sums);
        index += task.batch * task.channels * volume;
      }
      __syncwarp();
    }
    T* const result = static_cast<T*>(task.grad_input) + channel * volume;
    for_each_element(task, tile, lane,
                     [&](int place, int at) { result[at] = Narrow<T>::from(sums[place]); });
    __syncwarp();
  }
}

// The tile with the least to look at per element, weighed against how many tiles there are.
void choose_tile(const Morphology& call, std::int64_t planes, std::int64_t most, int processors,
                 int* tile) {
  double least = std::numeric_limits<double>::infinity();
  for (int w = 8; w <= 128; w *= 2) {
    for (int h = 1; h <= 64; h *= 2) {
      for (int d = 1; d <= 16; d *= 2) {
        const int wanted[kSpatialAxes] = {d, h, w};
        int size[kSpatialAxes];
        std::int64_t elements = 1, tiles = planes;
        double looks = 1.0;
        for (int axis = 0; axis < kSpatialAxes; ++axis) {
          const std::int64_t n = call.size[axis];
          size[axis] = static_cast<int>(std::min<std::int64_t>(wanted[axis], n));
          elements *= size[axis];
          tiles *= (n + size[axis] - 1) / size[axis];
          const std::int64_t seen = std::min(n, size[axis] + 2 * call.reach[axis]);
          // Rows are looked at in steps of a warp.
          looks *= static_cast<double>(axis == 2 ? (seen + kWarp - 1) / kWarp * kWarp : seen);
        }
        if (elements > most) continue;
        const double wave = static_cast<double>(kWarpTilesPerProcessor) * processors;
        const double cost = looks / static_cast<double>(elements) *
                            std::max(1.0, wave / static_cast<double>(tiles));
        if (cost >= least) continue;
        least = cost;
        std::copy(size, size + kSpatialAxes, tile);
      }
    }
  }
}

template <class T, class Index, class Sum>
void start(const BackwardTask& task, cudaStream_t stream) {
  const std::int64_t blocks = std::min<std::int64_t>(
      (task.num_tiles + kWarpsPerBlock - 1) / kWarpsPerBlock, std::int64_t{1} << 30);
  const int bytes =
      kWarpsPerBlock * task.tile[0] * task.tile[1] * task.tile[2] * static_cast<int>(sizeof(Sum));
  launch_with_shared("morphology_backward_kernel", morphology_backward_kernel<T, Index, Sum>,
                     static_cast<int>(blocks), kBackwardThreads, bytes, stream, task);
}

template <class Index>
void start_as(DType dtype, const BackwardTask& task, cudaStream_t stream) {
  switch (dtype) {
    case DType::kFloat64:
      return start<double, Index, double>(task, stream);
    case DType::kFloat32:
      return start<float, Index, float>(task, stream);
    case DType::kBFloat16:
      return start<__nv_bfloat16, Index, float>(task, stream);
    case DType::kFloat16:
      return start<__half, Index, float>(task, stream);
  }
}

}  // namespace

void morphology_backward(const Morphology& call, const MorphologyBackward& grads, int device,
                         void* stream) {
  if (call.batch == 0 || call.channels == 0 || call.volume() == 0) return;
  const DeviceGuard guard(device);
  int processors = 1, shared_bytes = 0;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "cudaDeviceGetAttribute");
  const std::int64_t sum_bytes = call.dtype == DType::kFloat64 ? 8 : 4;
  BackwardTask task{};
  task.wrap = call.border == Border::kWrap;
  task.by_row = divisor_of(call.size[2]);
  task.by_plane = divisor_of(call.size[1] * call.size[2]);
  task.batch = call.batch;
  task.channels = call.channels;
  task.grad_output = grads.grad_output;
  task.grad_input = grads.grad_input;
  task.index = call.index;
  task.source = math::source_index(call);
  for (std::int64_t end; task.first < call.channels; task.first = end) {
    end = task.first + 1;
    while (end < call.channels &&
           call.program_of_channel[end] == call.program_of_channel[task.first]) {
      ++end;
    }
    task.count = end - task.first;
    choose_tile(call, call.batch * task.count, shared_bytes / kWarpsPerBlock / 3 / sum_bytes,
                processors, task.tile);
    task.num_tiles = call.batch * task.count;
    for (int axis = 0; axis < kSpatialAxes; ++axis) {
      task.size[axis] = static_cast<int>(call.size[axis]);
      task.reach[axis] =
          static_cast<int>(std::min<std::int64_t>(call.reach[axis], call.size[axis]));
      task.tiles[axis] = (task.size[axis] - 1) / task.tile[axis] + 1;
      task.num_tiles *= task.tiles[axis];
    }
    const MorphologyProgram& program = call.program(task.first);
    if (program.size() > kMostMorphologyTerms) {
      throw std::invalid_argument("morphology: a program may have at most 64 terms");
    }
    task.terms = static_cast<int>(program.size());
    task.moves = task.negative = 0;
    for (int t = 0; t < task.terms; ++t) {
      const std::uint64_t bit = std::uint64_t{1} << t;
      if (!program[t].stages.empty()) task.moves |= bit;
      if (program[t].sign < 0) task.negative |= bit;
    }
    if (call.index_bits == 16) {
      start_as<std::int16_t>(call.dtype, task, static_cast<cudaStream_t>(stream));
    } else {
      start_as<std::int32_t>(call.dtype, task, static_cast<cudaStream_t>(stream));
    }
  }
}

}  // namespace dpfast::cuda
