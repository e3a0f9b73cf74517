// How a chain is cut into launches. Host code.
//
// Boxes share a launch while a tile with all that they reach fits in shared memory and is not too
// much larger than the tile alone: each item of the surroundings is taken anew by several blocks.
// Else every box has its own, else every axis of it. An element has one or, where it is large,
// several, each for a part of it: the maximum over an element is that of its parts' maxima.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "cuda/morphology_element.cuh"
#include "math/morphology.h"

namespace dpfast::cuda {

// Items of a region per output, above which a chain is cut rather than taken in one launch: two
// launches write and read an item more, but their regions are smaller.
constexpr double kMostItemsPerOutput = 4.5;
// The same for an element's part: as a rule there are more parts than there are boxes.
constexpr double kMostItemsPerElementOutput = 8.0;
// Outputs of a tile: between these, so that every multiprocessor gets several tiles.
constexpr int kLeastOutputs = 1024, kMostOutputs = 16384;
constexpr int kTilesPerProcessor = 8;
constexpr int kTileCost = 1024;  // items in whose time a block finds its place and waits
constexpr int kMostRun = 512;    // positions; longer runs are cut

struct Span {
  int before[kSpatialAxes], after[kSpatialAxes];
};

struct Tile {
  int size[kSpatialAxes];
  double items_per_output = std::numeric_limits<double>::infinity();  // no tile fits
};

inline int row_items(int width) { return width | 1; }

inline std::int64_t buffer_items(const int* tile, const Span& span) {
  std::int64_t items = row_items(tile[2] + span.before[2] + span.after[2]);
  for (int axis = 0; axis < 2; ++axis) {
    items *= std::int64_t{tile[axis]} + span.before[axis] + span.after[axis];
  }
  return items;
}

// The tile with the least to do per output, of those whose two buffers fit.
inline Tile best_tile(const std::int64_t* size, const Span& span, std::int64_t item_bytes,
                      std::int64_t shared_bytes, int most_outputs) {
  Tile best;
  double least = best.items_per_output;
  for (int w = 8; w <= 256; w *= 2) {
    for (int h = 1; h <= 128; h *= 2) {
      for (int d = 1; d <= 32; d *= 2) {
        const int wanted[kSpatialAxes] = {d, h, w};
        int tile[kSpatialAxes];
        std::int64_t outputs = 1;
        for (int axis = 0; axis < kSpatialAxes; ++axis) {
          const std::int64_t tiles = (size[axis] + wanted[axis] - 1) / wanted[axis];
          tile[axis] = static_cast<int>((size[axis] + tiles - 1) / tiles);  // all about the same
          outputs *= tile[axis];
        }
        const std::int64_t items = buffer_items(tile, span);
        if (outputs > most_outputs || 2 * items * item_bytes > shared_bytes) continue;
        const double cost = static_cast<double>(items + kTileCost) / static_cast<double>(outputs);
        if (cost >= least) continue;
        least = cost;
        best.items_per_output = static_cast<double>(items) / static_cast<double>(outputs);
        std::copy(tile, tile + kSpatialAxes, best.size);
      }
    }
  }
  return best;
}

struct PlannedLaunch {
  bool element;
  Tile tile;
  Span span;
  Boxes boxes;
  ElementTask task;  // without best_so_far
  bool first, last;  // of an element's
};

class Planner {
 public:
  // For `outputs` in all.
  Planner(const Morphology& call, std::int64_t outputs, std::int64_t item_bytes,
          std::int64_t shared_bytes, int processors)
      : call_(call), item_bytes_(item_bytes), shared_bytes_(shared_bytes) {
    const std::int64_t each = outputs / (std::int64_t{kTilesPerProcessor} * processors);
    most_outputs_ = static_cast<int>(
        std::min<std::int64_t>(std::max<std::int64_t>(each, kLeastOutputs), kMostOutputs));
  }

  std::vector<PlannedLaunch> plan(const MorphologyTerm& term) {
    launches_.clear();
    for (const MorphologyStage& stage : term.stages) {
      if (stage.kind == ElementKind::kBox) {
        add_box(clamped(stage));
      } else if (stage.kind == ElementKind::kFlat) {
        add_element(stage.dilate, stage.runs);
      } else {
        add_element(stage.dilate, stage.taps);
      }
    }
    if (launches_.empty()) add_boxes({});  // the input itself
    return std::move(launches_);
  }

 private:
  // A window that holds all positions that there are grows no more.
  BoxStage clamped(const MorphologyStage& stage) const {
    BoxStage box{};
    box.dilate = stage.dilate;
    for (int axis = 0; axis < kSpatialAxes; ++axis) {
      const std::int64_t n = call_.size[axis];
      std::int64_t most = n - 1;
      if (call_.border == Border::kConstant) most = n;  // and the constant
      if (call_.border == Border::kReflect) most = 2 * n - 1;
      if (call_.border == Border::kMirror) most = 2 * n - 2;
      box.low[axis] = static_cast<int>(std::max(stage.low[axis], -most));
      box.high[axis] = static_cast<int>(std::min(stage.high[axis], most));
    }
    return box;
  }

  static bool trivial(const BoxStage& box, int axis) {
    return box.low[axis] == 0 && box.high[axis] == 0;
  }

  // Whether the region after `box` is what the next stage needs, or becomes it in its block.
  bool may_continue(const BoxStage& box) const {
    if (call_.border != Border::kReflect && call_.border != Border::kMirror) return true;
    for (int axis = 0; axis < kSpatialAxes; ++axis) {
      if (box.low[axis] != -box.high[axis]) return false;
    }
    return true;
  }

  static Span span_of(const Boxes& boxes) {
    Span span{};
    for (int s = 0; s < boxes.count; ++s) {
      for (int axis = 0; axis < kSpatialAxes; ++axis) {
        span.before[axis] -= boxes.stages[s].low[axis];
        span.after[axis] += boxes.stages[s].high[axis];
      }
    }
    return span;
  }

  Tile tile_of(const Span& span, int most_outputs = kMostOutputs) const {
    return best_tile(call_.size, span, item_bytes_, shared_bytes_,
                     std::min(most_outputs, most_outputs_));
  }

  bool add_boxes(const Boxes& boxes, double most = std::numeric_limits<double>::max()) {
    PlannedLaunch launch{};
    launch.span = span_of(boxes);
    launch.tile = tile_of(launch.span);
    launch.boxes = boxes;
    if (launch.tile.items_per_output > most) return false;
    launches_.push_back(launch);
    return true;
  }

  void add_box(const BoxStage& box) {
    int axes = 0;
    for (int axis = 0; axis < kSpatialAxes; ++axis) axes += trivial(box, axis) ? 0 : 1;
    if (axes == 0) return;
    if (joins(box)) return;
    Boxes boxes{};
    boxes.stages[boxes.count++] = box;
    if (axes == 1) return add_window(box);
    if (add_boxes(boxes, kMostItemsPerOutput)) return;
    for (int axis = kSpatialAxes - 1; axis >= 0; --axis) {
      BoxStage part{};
      part.dilate = box.dilate;
      part.low[axis] = box.low[axis];
      part.high[axis] = box.high[axis];
      add_box(part);
    }
  }

  // Puts a box into the launch before it, where that is worth it.
  bool joins(const BoxStage& box) {
    if (launches_.empty() || launches_.back().element) return false;
    const PlannedLaunch before = launches_.back();
    Boxes boxes = before.boxes;
    if (boxes.count == kStagesPerLaunch || !may_continue(boxes.stages[boxes.count - 1])) {
      return false;
    }
    boxes.stages[boxes.count++] = box;
    launches_.pop_back();
    if (add_boxes(boxes, kMostItemsPerOutput)) return true;
    launches_.push_back(before);
    return false;
  }

  // A window along one axis; where no tile holds it, as a flat element.
  void add_window(const BoxStage& box) {
    Boxes boxes{};
    boxes.stages[boxes.count++] = box;
    if (add_boxes(boxes)) return;
    std::vector<ElementRun> runs;
    for (int d = box.low[0]; d <= box.high[0]; ++d) {
      for (int h = box.low[1]; h <= box.high[1]; ++h) {
        runs.push_back({d, h, box.low[2], box.high[2] - box.low[2] + 1});
      }
    }
    add_element(box.dilate, runs);
  }

  static ElementRun run_of(const ElementRun& run) { return run; }
  static ElementRun run_of(const ElementTap& tap) { return {tap.depth, tap.height, tap.width, 1}; }

  // The box around some runs, with their outputs in it.
  static Span grown(Span span, const ElementRun& run) {
    const int low[kSpatialAxes] = {run.depth, run.height, run.width};
    const int high[kSpatialAxes] = {run.depth, run.height, run.width + run.length - 1};
    for (int axis = 0; axis < kSpatialAxes; ++axis) {
      span.before[axis] = std::max(span.before[axis], -low[axis]);
      span.after[axis] = std::max(span.after[axis], high[axis]);
    }
    return span;
  }

  static double height_of(const ElementRun&) { return 0.0; }
  static double height_of(const ElementTap& tap) { return tap.value; }

  static std::vector<ElementTap> pieces(const std::vector<ElementTap>& taps) { return taps; }
  static std::vector<ElementRun> pieces(const std::vector<ElementRun>& runs) {
    std::vector<ElementRun> all;
    for (ElementRun run : runs) {
      for (; run.length > kMostRun; run.length -= kMostRun, run.width += kMostRun) {
        all.push_back({run.depth, run.height, run.width, kMostRun});
      }
      all.push_back(run);
    }
    return all;
  }

  template <class Part>
  void add_element(bool dilate, const std::vector<Part>& whole) {
    const std::vector<Part> parts = pieces(whole);
    for (std::size_t begin = 0; begin < parts.size();) {
      // As many as one launch holds.
      Span span = grown(empty_span(), run_of(parts[begin]));
      std::size_t end = begin + 1;
      while (end < parts.size() && end - begin < kSourcesPerLaunch) {
        const Span more = grown(span, run_of(parts[end]));
        if (!same(more, span) && !fits(more)) break;
        span = more;
        ++end;
      }
      add_part(dilate, parts.data() + begin, parts.data() + end, span);
      launches_.back().first = begin == 0;
      launches_.back().last = end == parts.size();
      begin = end;
    }
  }

  // A part of an element may lie to one side of its outputs: the reach is then less than none.
  static Span empty_span() {
    Span span;
    std::fill(span.before, span.before + kSpatialAxes, std::numeric_limits<int>::min());
    std::fill(span.after, span.after + kSpatialAxes, std::numeric_limits<int>::min());
    return span;
  }

  static bool same(const Span& a, const Span& b) {
    return std::equal(a.before, a.before + kSpatialAxes, b.before) &&
           std::equal(a.after, a.after + kSpatialAxes, b.after);
  }

  bool fits(const Span& span) const {
    return tile_of(span, kElementOutputs).items_per_output <= kMostItemsPerElementOutput;
  }

  template <class Part>
  void add_part(bool dilate, const Part* begin, const Part* end, const Span& span) {
    PlannedLaunch launch{};
    launch.element = true;
    launch.span = span;
    launch.tile = tile_of(span, kElementOutputs);
    ElementTask& task = launch.task;
    task.dilate = dilate;
    task.additive = std::is_same_v<Part, ElementTap>;
    const int row = row_items(launch.tile.size[2] + span.before[2] + span.after[2]);
    const int plane = row * (launch.tile.size[1] + span.before[1] + span.after[1]);
    int count = 0;
    for (int level = 0; level < kElementLevels; ++level) {
      for (const Part* part = begin; part != end; ++part) {
        const ElementRun run = run_of(*part);
        if (run.length >> level != 1) continue;
        const int first = (run.depth + span.before[0]) * plane +
                          (run.height + span.before[1]) * row + run.width + span.before[2];
        task.sources[count++] = {first, first + run.length - (1 << level), height_of(*part)};
        task.levels = level + 1;
      }
      task.level_end[level] = count;
    }
    launches_.push_back(launch);
  }

  const Morphology& call_;
  std::int64_t item_bytes_, shared_bytes_;
  int most_outputs_;
  std::vector<PlannedLaunch> launches_;
};

}  // namespace dpfast::cuda
