// How an index says from where a value was copied: by how much the source's number exceeds the own
// one.
//
// An element's number is depth * plane + height * row + width, and numbers have the order of the
// elements. With the channel's own strides the difference is the distance in memory, which must fit
// in the index. In a volume it soon does not fit in 16 bits, though few sources are within reach.
// There the strides are larger ones, chosen so that their low bits are those of a box just as large
// as the reach: the low bits of the difference then name the source's place in that box.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "math/macros.h"
#include "math/morphology.h"

namespace dpfast {

struct SourceIndex {
  std::int32_t plane, row;  // strides of numbers
  int cut;                  // highest bits of a difference that are dropped
  // Of a box: its strides, the middle of its places, and what leads from a place to a distance in
  // memory.
  bool boxed;
  float per_box_plane, per_box_row;  // 1 / stride
  std::int32_t middle, plane_step, row_step, origin;
};

namespace math {

DPFAST_HOST_DEVICE std::int32_t source_number(const SourceIndex& index, std::int64_t depth,
                                              std::int64_t height, std::int64_t width) {
  return static_cast<std::int32_t>(depth * index.plane + height * index.row + width);
}

// From a difference of numbers to what is stored.
DPFAST_HOST_DEVICE std::int32_t stored_source(const SourceIndex& index, std::int32_t difference) {
  return static_cast<std::int32_t>(static_cast<std::uint32_t>(difference) << index.cut) >>
         index.cut;
}

// From what is stored to the distance in memory. Places are below 2^16: with 1/2 added, a quotient
// is further from a whole number than its rounding error.
DPFAST_HOST_DEVICE std::int32_t source_distance(const SourceIndex& index, std::int32_t stored) {
  if (!index.boxed) return stored;
  const std::int32_t place = stored + index.middle;
  const float between = static_cast<float>(place) + 0.5f;
  const std::int32_t planes = static_cast<std::int32_t>(between * index.per_box_plane);
  const std::int32_t rows = static_cast<std::int32_t>(between * index.per_box_row);
  return place + planes * index.plane_step + rows * index.row_step - index.origin;
}

// Elements of the box of everything within reach of an element, along one axis.
static inline std::int64_t reach_box(const Morphology& call, int axis) {
  const std::int64_t far = call.size[axis] - 1;
  const bool across = call.border == Border::kWrap && call.reach[axis] > 0;
  return 2 * (across ? far : std::min(call.reach[axis], far)) + 1;
}

// Of a call's index, as wide as it is; invalid_argument where that is too narrow.
static inline SourceIndex source_index(const Morphology& call) {
  const std::int64_t width = call.size[2], plane = call.size[1] * width;
  const std::int64_t box[kSpatialAxes] = {reach_box(call, 0), reach_box(call, 1),
                                          reach_box(call, 2)};
  SourceIndex index{};
  index.plane = static_cast<std::int32_t>(plane);
  index.row = static_cast<std::int32_t>(width);
  const std::int64_t furthest = box[0] / 2 * plane + box[1] / 2 * width + box[2] / 2;
  const bool wide = call.index == nullptr || call.index_bits == 32;
  if (wide || furthest < 1 << 15) return index;
  const std::int64_t box_plane = box[1] * box[2], places = box[0] * box_plane;
  int bits = 1;
  while ((std::int64_t{1} << bits) <= places) ++bits;
  const std::int64_t modulus = std::int64_t{1} << bits;
  // The next number that is at least `least` and equal to `like` in its low bits.
  const auto next = [modulus](std::int64_t least, std::int64_t like) {
    return like + (std::max<std::int64_t>(least - like, 0) + modulus - 1) / modulus * modulus;
  };
  const std::int64_t row_stride = next(width, box[2]);
  const std::int64_t plane_stride = next(call.size[1] * row_stride, box_plane);
  if (bits > 16 || call.size[0] * plane_stride > INT32_MAX) {
    throw std::invalid_argument("morphology: an index of 16 bits is too narrow for these sizes");
  }
  index.plane = static_cast<std::int32_t>(plane_stride);
  index.row = static_cast<std::int32_t>(row_stride);
  index.cut = 32 - bits;
  index.boxed = true;
  index.per_box_plane = 1.0f / static_cast<float>(box_plane);
  index.per_box_row = 1.0f / static_cast<float>(box[2]);
  index.middle = static_cast<std::int32_t>(places / 2);
  index.row_step = static_cast<std::int32_t>(width - box[2]);
  index.plane_step = static_cast<std::int32_t>(plane - box[1] * width);
  index.origin = index.middle + static_cast<std::int32_t>(box[0] / 2) * index.plane_step +
                 static_cast<std::int32_t>(places / 2 / box[2]) * index.row_step;
  return index;
}

}  // namespace math
}  // namespace dpfast
