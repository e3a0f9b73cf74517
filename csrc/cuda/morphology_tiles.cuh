// A block's tile: how it comes into shared memory with what lies around it, windows along its lines
// there, and how results leave it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "cuda/launch.cuh"
#include "cuda/morphology_items.cuh"
#include "math/source_index.h"

namespace dpfast::cuda {

constexpr int kMorphologyThreads = 512;
constexpr int kBlocksPerMultiprocessor = 2;
constexpr int kWarpThreads = 32;
constexpr int kStagesPerLaunch = 6;

// The channels of one launch, in all samples: [first, first + count) of `channels`.
struct ChannelRange {
  std::int64_t batch, channels, first, count;
};

// What a launch reads and writes, and how it is cut.
struct Tiling {
  int size[kSpatialAxes];
  int tile[kSpatialAxes];
  int before[kSpatialAxes], after[kSpatialAxes];  // what a tile's outputs reach beyond it
  int row_items, plane_items, buffer_items;       // of shared memory; rows are odd: no conflicts
  int tiles[kSpatialAxes];
  std::int64_t num_tiles;  // of all channels
  ChannelRange channels;
  Border border;
  double border_value;

  const void* input;     // where the chain begins; else null, and
  const void* items_in;  // items that a former launch left, [batch, count, volume]
  void* items_out;       // where the chain goes on; else null, and the rest is used
  void* output;
  void* index;
  int index_bits;
  SourceIndex source;
  int sign;
  // Terms before this one are in the output, or where that is too narrow in `sums`; the last term
  // goes to the output in any case.
  bool add, last_term;
  float* sums;
};

struct BoxStage {
  int low[kSpatialAxes], high[kSpatialAxes];
  bool dilate;
};

struct Boxes {
  BoxStage stages[kStagesPerLaunch];
  int count;
};

// A tile on its way: `origin` of its outputs, its extent, and the part of shared memory that holds
// items (in positions there).
struct Region {
  int origin[kSpatialAxes], extent[kSpatialAxes];
  int begin[kSpatialAxes], end[kSpatialAxes];
  std::int64_t plane;    // among the launch's
  std::int64_t channel;  // among the tensor's
};

__device__ inline std::int64_t volume_of(const Tiling& tiling) {
  return static_cast<std::int64_t>(tiling.size[0]) * tiling.size[1] * tiling.size[2];
}

__device__ inline Region region_of(const Tiling& tiling, std::int64_t tile) {
  Region region;
  for (int axis = kSpatialAxes - 1; axis >= 0; --axis) {
    region.origin[axis] = static_cast<int>(tile % tiling.tiles[axis]) * tiling.tile[axis];
    tile /= tiling.tiles[axis];
    const int left = tiling.size[axis] - region.origin[axis];
    region.extent[axis] = left < tiling.tile[axis] ? left : tiling.tile[axis];
    region.begin[axis] = 0;
    region.end[axis] = region.extent[axis] + tiling.before[axis] + tiling.after[axis];
  }
  const ChannelRange& channels = tiling.channels;
  region.plane = tile;
  region.channel =
      tile / channels.count * channels.channels + channels.first + tile % channels.count;
  return region;
}

template <class Items>
__device__ typename Items::Item item_outside(const Tiling& tiling, bool negated) {
  if (tiling.border == Border::kGeodesic) return Items::outside();
  const typename Items::Item item = Items::constant(tiling.border_value);
  return negated ? Items::negate(item) : item;
}

// The region, extended beyond the image as the border says. A warp takes a row.
template <class Items, class T>
__device__ void load_region(const Tiling& tiling, const Region& region, bool negated,
                            typename Items::Item* to) {
  using Item = typename Items::Item;
  const std::int64_t volume = volume_of(tiling);
  const T* input = static_cast<const T*>(tiling.input) + region.channel * volume;
  const Item* items = static_cast<const Item*>(tiling.items_in) + region.plane * volume;
  const Item outside = item_outside<Items>(tiling, negated);
  const int heights = region.end[1], width = region.end[2], n = tiling.size[2];
  const std::int64_t first_column = std::int64_t{region.origin[2]} - tiling.before[2];
  const bool within = first_column >= 0 && first_column + width <= n;
  const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
  for (int row = static_cast<int>(threadIdx.x) / kWarpThreads; row < region.end[0] * heights;
       row += kMorphologyThreads / kWarpThreads) {
    const int d = row / heights, h = row % heights;
    const std::int64_t depth = math::border_position(
        std::int64_t{region.origin[0]} - tiling.before[0] + d, tiling.size[0], tiling.border);
    const std::int64_t height = math::border_position(
        std::int64_t{region.origin[1]} - tiling.before[1] + h, tiling.size[1], tiling.border);
    const bool there = depth >= 0 && height >= 0;
    const std::int64_t line = (depth * tiling.size[1] + height) * n;
    Item* to_row = to + d * tiling.plane_items + h * tiling.row_items;
#pragma unroll 4
    for (int w = lane; w < width; w += kWarpThreads) {
      std::int64_t column = first_column + w;
      if (!within) column = math::border_position(column, n, tiling.border);
      Item item = outside;
      if (there && column >= 0) {
        const std::int64_t at = line + column;
        item = tiling.input != nullptr
                   ? Items::from(widen(input[at]),
                                 math::source_number(tiling.source, depth, height, column))
                   : items[at];
        if (negated) item = Items::negate(item);
      }
      to_row[w] = item;
    }
  }
}

// The end of a chain, at element `at` of its channel, or what the next launch goes on with.
template <class Items, class T>
__device__ void store_item(const Tiling& tiling, const Region& region, std::int64_t at,
                           std::int32_t number, typename Items::Item item) {
  const std::int64_t volume = volume_of(tiling);
  if (tiling.items_out != nullptr) {
    static_cast<typename Items::Item*>(tiling.items_out)[region.plane * volume + at] = item;
    return;
  }
  const std::int64_t there = region.channel * volume + at;
  T* output = static_cast<T*>(tiling.output) + there;
  typename Items::Value value = Items::value(item);
  if (tiling.sign < 0) value = -value;
  if (tiling.add) value = (tiling.sums != nullptr ? tiling.sums[there] : widen(*output)) + value;
  if (tiling.sums != nullptr && !tiling.last_term) {
    tiling.sums[there] = static_cast<float>(value);
  } else {
    *output = Narrow<T>::from(value);
  }
  if constexpr (Items::kHasIndex) {
    if (tiling.index == nullptr) return;
    const std::int32_t source = Items::number(item);
    const std::int32_t stored = math::stored_source(tiling.source, source - number);
    if (tiling.index_bits == 32) {
      static_cast<std::int32_t*>(tiling.index)[there] = source < 0 ? INT32_MIN : stored;
    } else {
      static_cast<std::int16_t*>(tiling.index)[there] =
          static_cast<std::int16_t>(source < 0 ? INT16_MIN : stored);
    }
  }
}

template <class Items, class T>
__device__ void store_region(const Tiling& tiling, const Region& region,
                             const typename Items::Item* from) {
  const int heights = region.extent[1];
  const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
  for (int row = static_cast<int>(threadIdx.x) / kWarpThreads; row < region.extent[0] * heights;
       row += kMorphologyThreads / kWarpThreads) {
    const int d = row / heights, h = row % heights;
    const typename Items::Item* from_row = from + (region.begin[0] + d) * tiling.plane_items +
                                           (region.begin[1] + h) * tiling.row_items +
                                           region.begin[2];
    const std::int64_t depth = region.origin[0] + d, height = region.origin[1] + h;
    const int column = region.origin[2];
    const std::int64_t line = (depth * tiling.size[1] + height) * tiling.size[2] + column;
    const std::int32_t number = math::source_number(tiling.source, depth, height, column);
    for (int w = lane; w < region.extent[2]; w += kWarpThreads) {
      store_item<Items, T>(tiling, region, line + w, number + w, from_row[w]);
    }
  }
}

// Stretches of kCount outputs. The windows [i, i + size) of a stretch have size - kCount + 1
// positions in common; what lies before these is kept in registers, what lies behind is met on the
// way: (size + kCount - 1) / kCount reads an output, and no more memory. kCount <= size.
template <class Items, int kCount>
__device__ void take_stretch(const typename Items::Item* in, typename Items::Item* out, int step,
                             int size, int skip, bool negate) {
  using Item = typename Items::Item;
  Item behind[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) behind[i] = in[i * step];
#pragma unroll 4
  for (int i = kCount; i < size; ++i) {
    behind[kCount - 1] = Items::best(behind[kCount - 1], in[i * step]);
  }
#pragma unroll
  for (int i = kCount - 2; i >= 0; --i) behind[i] = Items::best(behind[i], behind[i + 1]);
  Item ahead = Items::outside();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (i > 0) ahead = Items::best(ahead, in[(size - 1 + i) * step]);
    const Item best = i > 0 ? Items::best(behind[i], ahead) : behind[0];
    if (i >= skip) out[i * step] = negate ? Items::negate(best) : best;
  }
}

// Windows [low, high] along an axis, from one buffer to the other, for all that the items at hand
// suffice for. Neighbouring threads take neighbouring lines.
template <class Items, int kCount>
__device__ void take_windows_by(const Tiling& tiling, const Region& region, int axis, int low,
                                int high, bool negate, const typename Items::Item* from,
                                typename Items::Item* to) {
  const int steps[kSpatialAxes] = {tiling.plane_items, tiling.row_items, 1};
  const int inner = axis == 2 ? 1 : 2, outer = axis == 0 ? 1 : 0;
  const int inners = region.end[inner] - region.begin[inner];
  const int lines = inners * (region.end[outer] - region.begin[outer]);
  const int length = region.end[axis] - region.begin[axis];
  const int stretches = (length + kCount - 1) / kCount, step = steps[axis];
  for (int task = static_cast<int>(threadIdx.x); task < lines * stretches;
       task += kMorphologyThreads) {
    const int line = task % lines, wanted = task / lines * kCount;
    // The last stretch may begin within the one before, whose outputs it leaves alone.
    const int start = wanted < length - kCount ? wanted : length - kCount;
    const int at = (region.begin[outer] + line / inners) * steps[outer] +
                   (region.begin[inner] + line % inners) * steps[inner] +
                   (region.begin[axis] + start) * step;
    take_stretch<Items, kCount>(from + at + low * step, to + at, step, high - low + 1,
                                wanted - start, negate);
  }
}

template <class Items>
__device__ void take_windows(const Tiling& tiling, Region& region, int axis, int low, int high,
                             bool negate, const typename Items::Item* from,
                             typename Items::Item* to) {
  region.begin[axis] -= low;
  region.end[axis] -= high;
  const int size = high - low + 1, length = region.end[axis] - region.begin[axis];
  const int most = size < length ? size : length;
  const auto take = [&](auto by) {
    take_windows_by<Items, decltype(by)::value>(tiling, region, axis, low, high, negate, from, to);
  };
  if (most >= 16 && Items::kSegment >= 16) {
    take(std::integral_constant<int, Items::kSegment>{});
  } else if (most >= 8) {
    take(std::integral_constant<int, 8>{});
  } else if (most >= 4) {
    take(std::integral_constant<int, 4>{});
  } else if (most >= 2) {
    take(std::integral_constant<int, 2>{});
  } else {
    take(std::integral_constant<int, 1>{});
  }
}

// Before the next stage what lies beyond the image must again be what the border puts there. The
// plan leaves to this only borders that need no more than the region; where an extension and a
// window may change places (wrap; reflect and mirror with symmetric windows) nothing is to be done.
template <class Items>
__device__ void extend_region(const Tiling& tiling, const Region& region, bool negated,
                              typename Items::Item* items) {
  if (tiling.border == Border::kWrap || tiling.border == Border::kReflect ||
      tiling.border == Border::kMirror) {
    return;
  }
  bool within = true;
  int first[kSpatialAxes];
  for (int axis = 0; axis < kSpatialAxes; ++axis) {
    first[axis] = region.origin[axis] - tiling.before[axis];
    within = within && first[axis] + region.begin[axis] >= 0 &&
             first[axis] + region.end[axis] <= tiling.size[axis];
  }
  if (within) return;
  const typename Items::Item outside = item_outside<Items>(tiling, negated);
  const int width = region.end[2] - region.begin[2], heights = region.end[1] - region.begin[1];
  const int count = width * heights * (region.end[0] - region.begin[0]);
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kMorphologyThreads) {
    const int at[kSpatialAxes] = {region.begin[0] + i / width / heights,
                                  region.begin[1] + i / width % heights,
                                  region.begin[2] + i % width};
    bool inside = true;
    int source[kSpatialAxes];
    for (int axis = 0; axis < kSpatialAxes; ++axis) {
      const int position = first[axis] + at[axis], last = tiling.size[axis] - 1;
      const int nearest = position < 0 ? 0 : position > last ? last : position;
      inside = inside && nearest == position;
      source[axis] = nearest - first[axis];
    }
    if (inside) continue;
    items[at[0] * tiling.plane_items + at[1] * tiling.row_items + at[2]] =
        tiling.border == Border::kNearest
            ? items[source[0] * tiling.plane_items + source[1] * tiling.row_items + source[2]]
            : outside;
  }
}

// Up to kStagesPerLaunch boxes in turn.
template <class Items, class T>
__global__ __launch_bounds__(
    kMorphologyThreads,
    kBlocksPerMultiprocessor) void morphology_boxes_kernel(const __grid_constant__ Tiling tiling,
                                                           const __grid_constant__ Boxes boxes) {
  using Item = typename Items::Item;
  Item* const memory = reinterpret_cast<Item*>(dynamic_shared());
  for (std::int64_t tile = blockIdx.x; tile < tiling.num_tiles; tile += gridDim.x) {
    Item* here = memory;
    Item* there = memory + tiling.buffer_items;
    Region region = region_of(tiling, tile);
    bool negated = boxes.count > 0 && !boxes.stages[0].dilate;
    load_region<Items, T>(tiling, region, negated, here);
    __syncthreads();
    for (int s = 0; s < boxes.count; ++s) {
      const BoxStage& stage = boxes.stages[s];
      const bool more = s + 1 < boxes.count;
      const bool next = more && !boxes.stages[s + 1].dilate;
      const bool turn = next != negated;  // with the last of its windows
      for (int axis = kSpatialAxes - 1; axis >= 0; --axis) {
        if (stage.low[axis] == 0 && stage.high[axis] == 0) continue;
        bool last = true;
        for (int other = axis - 1; other >= 0; --other) {
          last = last && stage.low[other] == 0 && stage.high[other] == 0;
        }
        take_windows<Items>(tiling, region, axis, stage.low[axis], stage.high[axis], last && turn,
                            here, there);
        Item* const swapped = here;
        here = there;
        there = swapped;
        __syncthreads();
      }
      negated = next;
      if (!more) continue;
      extend_region<Items>(tiling, region, negated, here);
      __syncthreads();
    }
    store_region<Items, T>(tiling, region, here);
    __syncthreads();
  }
}

}  // namespace dpfast::cuda
