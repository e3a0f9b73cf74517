// Flat and additive elements of any shape, and boxes that no tile can hold.
//
// The maximum over a run along the width is that of two windows of a power of two. Runs come in the
// order of that power, and the tile's windows grow beside them: 1, 2, 4, ... A thread holds its
// outputs in registers meanwhile.
#pragma once

#include "cuda/morphology_tiles.cuh"

namespace dpfast::cuda {

constexpr int kOutputsPerThread = 4;
constexpr int kElementOutputs = kOutputsPerThread * kMorphologyThreads;  // of a tile, at most
constexpr int kElementLevels = 12;  // runs of up to 2^12 - 1 positions; longer ones are cut
// By value in kernel parameters (4 KB of them, and 32,764 bytes from CUDA 12.1 on): no copy whose
// source would have to stay alive, in a graph least of all. More go through several launches.
#if CUDART_VERSION >= 12010
constexpr int kSourcesPerLaunch = 960;
#else
constexpr int kSourcesPerLaunch = 192;
#endif

// Where two windows (or one, twice) or a tap of the tile's first output are in shared memory, and
// the tap's height.
struct ElementSource {
  int first, second;
  double height;
};

struct ElementTask {
  ElementSource sources[kSourcesPerLaunch];
  int level_end[kElementLevels];  // sources of this level and those below
  int levels;
  bool dilate, additive;
  const void* best_so_far;  // of former launches of this element, [batch, count, volume]; or null
};

template <class Items, class T>
__global__
__launch_bounds__(kMorphologyThreads, kBlocksPerMultiprocessor) void morphology_element_kernel(
    const __grid_constant__ Tiling tiling, const __grid_constant__ ElementTask task) {
  using Item = typename Items::Item;
  Item* const memory = reinterpret_cast<Item*>(dynamic_shared());
  const std::int64_t volume = volume_of(tiling);
  const bool negated = !task.dilate;
  for (std::int64_t tile = blockIdx.x; tile < tiling.num_tiles; tile += gridDim.x) {
    Item* here = memory;
    Item* there = memory + tiling.buffer_items;
    const Region region = region_of(tiling, tile);
    load_region<Items, T>(tiling, region, negated, here);
    const int width = region.extent[2], heights = region.extent[1];
    const int outputs = region.extent[0] * heights * width;
    // Outputs of this thread: where they are in the image and in shared memory.
    std::int64_t at[kOutputsPerThread];
    std::int32_t number[kOutputsPerThread];
    int place[kOutputsPerThread];
    Item best[kOutputsPerThread];
#pragma unroll
    for (int r = 0; r < kOutputsPerThread; ++r) {
      const int output = static_cast<int>(threadIdx.x) + r * kMorphologyThreads;
      const int known = output < outputs ? output : 0;
      const int w = known % width, h = known / width % heights, d = known / width / heights;
      const std::int64_t depth = region.origin[0] + d, height = region.origin[1] + h;
      const int column = region.origin[2] + w;
      at[r] = (depth * tiling.size[1] + height) * tiling.size[2] + column;
      number[r] = math::source_number(tiling.source, depth, height, column);
      place[r] = d * tiling.plane_items + h * tiling.row_items + w;
      best[r] = Items::outside();
      if (task.best_so_far != nullptr && output < outputs) {
        best[r] = static_cast<const Item*>(task.best_so_far)[region.plane * volume + at[r]];
        if (negated) best[r] = Items::negate(best[r]);
      }
    }
    __syncthreads();
    int next = 0;
    for (int level = 0; level < task.levels; ++level) {
      if (level > 0) {  // windows of 2^level, wherever their positions are there
        const int half = 1 << (level - 1), columns = region.end[2] - 2 * half + 1;
        const int rows = region.end[0] * region.end[1];
        for (int i = static_cast<int>(threadIdx.x); i < rows * columns; i += kMorphologyThreads) {
          const int row = i / columns;
          const int from = row / region.end[1] * tiling.plane_items +
                           row % region.end[1] * tiling.row_items + i % columns;
          there[from] = Items::best(here[from], here[from + half]);
        }
        Item* const swapped = here;
        here = there;
        there = swapped;
        __syncthreads();
      }
      for (; next < task.level_end[level]; ++next) {
        const ElementSource source = task.sources[next];
#pragma unroll
        for (int r = 0; r < kOutputsPerThread; ++r) {
          const Item first = here[place[r] + source.first];
          if (task.additive) {
            best[r] = Items::best(best[r], Items::raise(first, source.height));
          } else {
            best[r] = Items::best(best[r], Items::best(first, here[place[r] + source.second]));
          }
        }
      }
      __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < kOutputsPerThread; ++r) {
      if (static_cast<int>(threadIdx.x) + r * kMorphologyThreads >= outputs) continue;
      store_item<Items, T>(tiling, region, at[r], number[r],
                           negated ? Items::negate(best[r]) : best[r]);
    }
  }
}

}  // namespace dpfast::cuda
