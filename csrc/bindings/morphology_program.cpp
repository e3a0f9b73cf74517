#include "bindings/morphology_program.h"

#include <algorithm>
#include <cstddef>
#include <limits>
#include <stdexcept>
#include <string>

namespace dpfast::bindings {
namespace {

[[noreturn]] void refuse(const char* rule) {
  throw std::invalid_argument(std::string("morphology: program ") + rule);
}

class Reader {
 public:
  Reader(const std::vector<std::int64_t>& numbers, const std::vector<double>& values)
      : numbers_(numbers), values_(values) {}

  std::int64_t number(std::int64_t least, std::int64_t most) {
    if (at_ == numbers_.size()) refuse("ends too early");
    const std::int64_t found = numbers_[at_++];
    if (found < least || found > most) refuse("holds a number out of range");
    return found;
  }

  double value() {
    if (value_at_ == values_.size()) refuse("has too few values");
    return values_[value_at_++];
  }

  void finish() const {
    if (at_ != numbers_.size() || value_at_ != values_.size()) refuse("is too long");
  }

 private:
  const std::vector<std::int64_t>& numbers_;
  const std::vector<double>& values_;
  std::size_t at_ = 0, value_at_ = 0;
};

constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max() / 4;

MorphologyStage read_stage(Reader& in) {
  MorphologyStage stage{};
  stage.dilate = in.number(0, 1) == 1;
  stage.kind = static_cast<ElementKind>(in.number(0, 2));
  for (int axis = 0; axis < kSpatialAxes; ++axis) {
    stage.low[axis] = in.number(-kMost, 0);
    stage.high[axis] = in.number(0, kMost);
  }
  if (stage.kind == ElementKind::kBox) return stage;
  const auto offset = [&](int axis) {
    return static_cast<std::int32_t>(in.number(stage.low[axis], stage.high[axis]));
  };
  for (std::int64_t left = in.number(1, kMost); left > 0; --left) {
    const std::int32_t depth = offset(0), height = offset(1), width = offset(2);
    if (stage.kind == ElementKind::kFlat) {
      const std::int64_t most = stage.high[2] - width + 1;
      stage.runs.push_back({depth, height, width, static_cast<std::int32_t>(in.number(1, most))});
    } else {
      stage.taps.push_back({depth, height, width, in.value()});
    }
  }
  return stage;
}

}  // namespace

Morphology read_morphology(const std::vector<std::int64_t>& shape,
                           const std::vector<std::int64_t>& program,
                           const std::vector<double>& values) {
  if (shape.size() != 2 + kSpatialAxes) refuse("needs a shape of five axes");
  Reader in(program, values);
  Morphology call{};
  call.batch = shape[0];
  call.channels = shape[1];
  for (int axis = 0; axis < kSpatialAxes; ++axis) call.size[axis] = shape[2 + axis];
  if (call.volume() >= std::numeric_limits<std::int32_t>::max()) {
    throw std::invalid_argument("morphology: a channel must have less than 2**31 - 1 elements");
  }
  call.border = static_cast<Border>(in.number(0, 5));
  call.border_value = in.value();
  for (int axis = 0; axis < kSpatialAxes; ++axis) call.reach[axis] = in.number(0, kMost);
  const std::int64_t programs = in.number(1, kMost);
  if (in.number(0, kMost) != call.channels) refuse("is for another number of channels");
  for (std::int64_t c = 0; c < call.channels; ++c) {
    call.program_of_channel.push_back(static_cast<int>(in.number(0, programs - 1)));
  }
  for (std::int64_t p = 0; p < programs; ++p) {
    MorphologyProgram terms;
    for (std::int64_t left = in.number(1, kMost); left > 0; --left) {
      MorphologyTerm term{};
      term.sign = in.number(0, 1) == 1 ? 1 : -1;
      for (std::int64_t stages = in.number(0, kMost); stages > 0; --stages) {
        term.stages.push_back(read_stage(in));
      }
      terms.push_back(std::move(term));
    }
    call.programs.push_back(std::move(terms));
  }
  in.finish();
  return call;
}

}  // namespace dpfast::bindings
