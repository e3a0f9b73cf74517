// Grey-scale morphology: what one call is told, and the formulae that CPU and CUDA share.
//
//   dilation:  y[p] = max over o of x[p + o] + height[o]
//   erosion:   y[p] = min over o of x[p + o] - height[o]
//
// over the offsets o of a structuring element, reflected for dilations already. A chain applies
// several of them in turn; a channel's result is a signed sum of chains, of which an empty one is
// the input itself (top-hat: x - opening(x)).
//
// The gradient of a chain's value goes to the one input element that it was copied from. Among
// equal values that is the element with the lowest index, whatever the order in which windows are
// taken: values are compared together with the index of their source, as one sortable key. -0 and
// +0 are equal. NaN wins every comparison.
#pragma once

#include <cstdint>
#include <vector>

#include "math/clip_and_noise.h"
#include "math/macros.h"

namespace dpfast {

constexpr int kSpatialAxes = 3;  // depth, height, width; depth 1 in 2D

enum class Border : int {
  kGeodesic = 0,  // nothing lies outside
  kConstant = 1,  // a constant does
  kReflect = 2,   // d c b a | a b c d | d c b a
  kMirror = 3,    // d c b | a b c d | c b a
  kNearest = 4,   // a a a a | a b c d | d d d d
  kWrap = 5,      // a b c d | a b c d | a b c d
};

enum class ElementKind : int { kBox = 0, kFlat = 1, kAdditive = 2 };

// Offsets (depth, height, width), (depth, height, width + 1), ..., `length` of them.
struct ElementRun {
  std::int32_t depth, height, width, length;
};

struct ElementTap {
  std::int32_t depth, height, width;
  double value;  // added to the element's input before the maximum is taken
};

struct MorphologyStage {
  bool dilate;
  ElementKind kind;
  // Offsets of the smallest box around the element, inclusive; low <= high, and for a box
  // low <= 0 <= high.
  std::int64_t low[kSpatialAxes], high[kSpatialAxes];
  std::vector<ElementRun> runs;  // of a flat element
  std::vector<ElementTap> taps;  // of an additive one
};

struct MorphologyTerm {
  int sign;  // +1 or -1
  std::vector<MorphologyStage> stages;
};

using MorphologyProgram = std::vector<MorphologyTerm>;

struct Morphology {
  std::int64_t batch, channels;
  std::int64_t size[kSpatialAxes];
  Border border;
  double border_value;
  // How far an element's value may travel along an axis, all stages of a chain together.
  std::int64_t reach[kSpatialAxes];
  std::vector<MorphologyProgram> programs;
  std::vector<int> program_of_channel;  // [C]

  DType dtype;
  const void* input;  // [B, C, D, H, W]
  void* output;       // likewise
  // Where the source lies (math/source_index.h), within a channel: [terms, B, C, D, H, W]. Null
  // where no gradient is wanted.
  void* index;
  int index_bits;  // 16 or 32; the lowest number says that the source is the border's constant

  std::int64_t volume() const { return size[0] * size[1] * size[2]; }
  const MorphologyProgram& program(std::int64_t channel) const {
    return programs[program_of_channel[channel]];
  }
};

// The reverse of a call: grad_input[p] = sum of sign * grad_output[q] over all q that took p.
struct MorphologyBackward {
  const void* grad_output;  // [B, C, D, H, W]
  void* grad_input;         // likewise
};

namespace math {

// Where position i of the extended axis lies, or -1 for outside (geodesic and constant).
DPFAST_HOST_DEVICE std::int64_t border_position(std::int64_t i, std::int64_t n, Border border) {
  if (i >= 0 && i < n) return i;
  switch (border) {
    case Border::kReflect: {
      const std::int64_t period = 2 * n;
      i = ((i % period) + period) % period;
      return i < n ? i : period - 1 - i;
    }
    case Border::kMirror: {
      if (n == 1) return 0;
      const std::int64_t period = 2 * n - 2;
      i = ((i % period) + period) % period;
      return i < n ? i : period - i;
    }
    case Border::kNearest:
      return i < 0 ? 0 : n - 1;
    case Border::kWrap:
      return ((i % n) + n) % n;
    default:
      return -1;
  }
}

// Integers in the order of the floats whose bits they are made from, and back: their own reverse.
DPFAST_HOST_DEVICE std::int32_t sortable(std::int32_t bits) {
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
DPFAST_HOST_DEVICE std::int64_t sortable(std::int64_t bits) {
  return bits ^ ((bits >> 63) & 0x7fffffffffffffff);
}

}  // namespace math
}  // namespace dpfast
