// Where an index says that its source lies, against every source within reach.
#include "math/source_index.h"

#include <algorithm>
#include <cstdio>
#include <random>
#include <set>
#include <stdexcept>

#include "tests/check.h"

namespace {

using namespace dpfast;

std::int64_t far_of(const Morphology& call, int axis) {
  const bool across = call.border == Border::kWrap && call.reach[axis] > 0;
  return across ? call.size[axis] - 1 : std::min(call.reach[axis], call.size[axis] - 1);
}

// Each from an element from which there is such a way.
void every_source_is_found(const Morphology& call, const SourceIndex& index) {
  const std::int64_t* size = call.size;
  std::set<std::int32_t> seen;
  std::int64_t ways = 0;
  const std::int64_t far[kSpatialAxes] = {far_of(call, 0), far_of(call, 1), far_of(call, 2)};
  for (std::int64_t d = -far[0]; d <= far[0]; ++d) {
    for (std::int64_t h = -far[1]; h <= far[1]; ++h) {
      for (std::int64_t w = -far[2]; w <= far[2]; ++w, ++ways) {
        const std::int64_t way[kSpatialAxes] = {d, h, w};
        std::int64_t own[kSpatialAxes], source[kSpatialAxes];
        for (int axis = 0; axis < kSpatialAxes; ++axis) {
          const std::int64_t low = std::max<std::int64_t>(0, -way[axis]);
          const std::int64_t high = size[axis] - 1 - std::max<std::int64_t>(0, way[axis]);
          own[axis] = (low + high) / 2;
          source[axis] = own[axis] + way[axis];
        }
        const std::int32_t stored =
            math::stored_source(index, math::source_number(index, source[0], source[1], source[2]) -
                                           math::source_number(index, own[0], own[1], own[2]));
        DPFAST_CHECK(stored > INT16_MIN && stored <= INT16_MAX);
        seen.insert(stored);
        const std::int64_t distance = (d * size[1] + h) * size[2] + w;
        DPFAST_CHECK(math::source_distance(index, stored) == distance);
      }
    }
  }
  if (index.boxed) DPFAST_CHECK(static_cast<std::int64_t>(seen.size()) == ways);
}

void numbers_have_the_order_of_elements(const Morphology& call, const SourceIndex& index) {
  const std::int64_t* size = call.size;
  DPFAST_CHECK(index.row >= size[2]);
  DPFAST_CHECK(index.plane > (size[1] - 1) * index.row + size[2] - 1);
  const std::int64_t last = (size[0] - 1) * index.plane + (size[1] - 1) * index.row + size[2] - 1;
  DPFAST_CHECK(last < INT32_MAX);
}

}  // namespace

int main() {
  std::mt19937 random(3);
  const auto pick = [&random](int n) { return static_cast<int>(random() % n); };
  int boxed = 0, refused = 0;
  for (int trial = 0; trial < 600 && dpfast::tests::failures() < 20; ++trial) {
    Morphology call{};
    call.index_bits = 16;
    call.index = &call;
    call.border = pick(4) == 0 ? Border::kWrap : Border::kGeodesic;
    for (int axis = 0; axis < kSpatialAxes; ++axis) {
      call.size[axis] = 1 + pick(pick(4) ? 250 : 12);
      call.reach[axis] = pick(6) == 0 ? 0 : pick(pick(3) == 0 ? 60 : 16);
    }
    try {
      const SourceIndex index = math::source_index(call);
      boxed += index.boxed ? 1 : 0;
      every_source_is_found(call, index);
      numbers_have_the_order_of_elements(call, index);
    } catch (const std::invalid_argument&) {
      ++refused;
      const std::int64_t places =
          math::reach_box(call, 0) * math::reach_box(call, 1) * math::reach_box(call, 2);
      DPFAST_CHECK(places > UINT16_MAX || call.size[0] * call.size[1] > 1 << 14);
    }
  }
  std::printf("source_index: %d of 600 in boxes, %d need 32 bits\n", boxed, refused);
  DPFAST_CHECK(boxed > 50 && refused > 50);
  return dpfast::tests::report("source_index");
}
