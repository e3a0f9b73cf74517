// What the morphology's inner loops are told; they exist once per instruction set.
//
// Elements on their way through a chain are items: a float or a double, or where the index of the
// source is wanted (or a NaN is about) a key. An erosion's items are negated, so that every window
// takes a maximum.
#pragma once

#include <cstdint>

#include "math/morphology.h"
#include "math/source_index.h"

namespace dpfast::cpu {

enum class ItemKind : int {
  kSingle = 0,
  kDouble = 1,
  kSingleKey = 2,
  kDoubleKey = 3,
  kCleanKey = 4,  // single; small boxes alone, and no NaN
};
constexpr int kItemKinds = 5;

DPFAST_HOST_DEVICE std::int64_t item_bytes(ItemKind kind) {
  return kind == ItemKind::kSingle ? 4 : kind == ItemKind::kDoubleKey ? 16 : 8;
}

// The windows [low, high] of one axis, low <= 0 <= high and not both 0.
struct WindowStep {
  std::int64_t low, high;
  bool negate_before;
};

// One sweep over the lines along one axis (0, 1, 2: depth, height, width), windows in turn.
struct Sweep {
  int axis;
  const WindowStep* steps;
  int num_steps;
};

// A flat or additive element, from one plane of items to another.
struct ElementSweep {
  const std::int64_t* low;   // [3]
  const std::int64_t* high;  // [3]
  const ElementRun* runs;    // in the order of their depths and heights; null: additive
  const ElementTap* taps;
  std::int64_t num_runs, num_taps;
  bool negate_before;
  const char* from;  // items
  char* to;
};

// A stage of a chain that is one of small boxes throughout: rows stream through all stages at once.
struct StreamBox {
  const std::int64_t* low;   // [3]
  const std::int64_t* high;  // [3]
  bool negate_before;
};

struct Stream {
  const StreamBox* boxes;
  int num_boxes;
};

constexpr int kStreamRows = 2;  // at a time
constexpr std::int64_t kStreamWindow = 11;
constexpr int kStreamBoxes = 4;

// One channel of one sample on its way through a chain. Its items lie in rows of whole vectors.
struct Chain {
  std::int64_t size[kSpatialAxes];
  std::int64_t row_items;  // from one row of items to the next
  Border border;
  double border_value;
  // Of this sweep, the first of a chain reads `input` and the last writes `output`; the others read
  // and write `items`, in which the channel lies as `negated` says.
  char* items;
  const void* input;  // the channel's, or null
  void* output;       // likewise
  void* index;        // with `output`; null: not wanted
  DType dtype;
  int index_bits;
  SourceIndex source;
  int sign;      // of the chain in the result
  bool add;      // to what `output` holds
  bool negated;  // the items, when the sweep begins
  bool negated_end;
  bool around_caches;  // the output is too large to be found there again
  // What the thread reads next, asked for while strips are at work in the caches; bytes, may be 0.
  const char* ask;
  std::int64_t ask_bytes;
  char* workspace;  // of one thread, as many bytes as the functions below say
};

// Neighbouring columns are taken together, in items: so many that the lines fit in the first-level
// cache, but several vectors where they are short, for whole cache lines and fewer pages at a time.
DPFAST_HOST_DEVICE std::int64_t strip_items(std::int64_t n, std::int64_t item_bytes,
                                            std::int64_t lanes, std::int64_t row_items) {
  constexpr std::int64_t kStripBytes = 24 << 10, kMaxVectors = 4;
  std::int64_t vectors = kStripBytes / (n * lanes * item_bytes);
  vectors = vectors < 1 ? 1 : vectors > kMaxVectors ? kMaxVectors : vectors;
  return vectors * lanes < row_items ? vectors * lanes : row_items;
}

// A line, what its windows reach beyond it, and a vector behind that is read and written in vain.
DPFAST_HOST_DEVICE std::int64_t sweep_workspace_bytes(const Chain& chain, const Sweep& sweep,
                                                      std::int64_t item_bytes, std::int64_t lanes) {
  const std::int64_t n = chain.size[sweep.axis];
  std::int64_t length = n;
  for (int s = 0; s < sweep.num_steps; ++s) length += sweep.steps[s].high - sweep.steps[s].low;
  const std::int64_t scale =
      sweep.axis == 2 ? 1 : strip_items(n, item_bytes, lanes, chain.row_items);
  return (length * scale + 2 * lanes) * item_bytes;
}

// Of one stage, in items: a line with what its windows along the width reach beyond it, and a
// vector that is read and written in vain; rows, behind such a vector each, and slices in rings.
struct StreamRoom {
  std::int64_t line_start, line_items, row_slots, slice_slots;
};

DPFAST_HOST_DEVICE StreamRoom stream_room(const Chain& chain, const StreamBox& box,
                                          std::int64_t lanes) {
  StreamRoom room{};
  room.line_start = (lanes - 1 - box.low[2]) / lanes * lanes;
  room.line_items = room.line_start + chain.row_items + (box.high[2] + 2 * lanes) / lanes * lanes;
  room.row_slots = box.high[1] - box.low[1] + 1 + kStreamRows;
  room.slice_slots = box.high[0] == box.low[0] ? 0 : box.high[0] - box.low[0] + 1;
  return room;
}

DPFAST_HOST_DEVICE std::int64_t stream_workspace_bytes(const Chain& chain, const Stream& stream,
                                                       std::int64_t item_bytes,
                                                       std::int64_t lanes) {
  std::int64_t items = 2 * chain.row_items;  // what lies outside
  for (int s = 0; s < stream.num_boxes; ++s) {
    const StreamRoom room = stream_room(chain, stream.boxes[s], lanes);
    items += kStreamRows * room.line_items + room.row_slots * (lanes + chain.row_items) +
             room.slice_slots * chain.size[1] * chain.row_items;
  }
  return items * item_bytes;
}

// An element's rows of input, extended by the border, in a ring: of each the row itself and its
// windows of 2, 4, ... up to the longest run.
struct ElementRing {
  std::int64_t slots, levels, row_items;
};

DPFAST_HOST_DEVICE ElementRing element_ring(const Chain& chain, const ElementSweep& sweep,
                                            std::int64_t lanes) {
  ElementRing ring{sweep.high[1] - sweep.low[1] + 1, 1, 0};
  for (std::int64_t r = 0; r < sweep.num_runs; ++r) {
    while (sweep.runs[r].length >= (std::int64_t{2} << (ring.levels - 1))) ++ring.levels;
  }
  const std::int64_t length = chain.size[2] + sweep.high[2] - sweep.low[2];
  ring.row_items = (length + 2 * lanes - 1) / lanes * lanes;
  return ring;
}

// The ring; which row is in each slot; two addresses and a number for each run or tap.
DPFAST_HOST_DEVICE std::int64_t element_workspace_bytes(const Chain& chain,
                                                        const ElementSweep& sweep,
                                                        std::int64_t item_bytes,
                                                        std::int64_t lanes) {
  const ElementRing ring = element_ring(chain, sweep, lanes);
  return ring.slots * ring.levels * ring.row_items * item_bytes + 8 * ring.slots +
         24 * (sweep.num_runs + sweep.num_taps) + 64;
}

struct MorphologyPasses {
  std::int64_t lanes;  // items of a vector
  // Lines of a sweep along an axis.
  std::int64_t (*num_lines)(const Chain& chain, int axis);
  // Lines [begin, end) of a sweep: rows of the channel (axis 2), or strips of neighbouring columns.
  // Whether a NaN was read from the input, which items that are no keys do not handle.
  bool (*sweep)(const Chain& chain, const Sweep& sweep, std::int64_t begin, std::int64_t end);
  // Slices (of an image: rows) [begin, end) of the result of a chain of small boxes; likewise.
  bool (*stream)(const Chain& chain, const Stream& stream, std::int64_t begin, std::int64_t end);
  // Rows [begin, end) of the channel through an element.
  void (*element)(const Chain& chain, const ElementSweep& sweep, std::int64_t begin,
                  std::int64_t end);
};

}  // namespace dpfast::cpu
