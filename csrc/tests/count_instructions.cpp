// A kernel's work and nothing else, for counting instructions: CASE REPEATS does it as often, on
// one thread, and prints how many elements one repeat has. Two counts of different repeats differ
// by the kernel's own instructions. Without arguments, the names of the cases.
//
// Everything is computed from fixed numbers: the count does not depend on the machine's load, and
// hardly on anything but the code.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cpu/clip_and_noise_cpu.h"
#include "cpu/conv_grad_cpu.h"
#include "cpu/morphology_cpu.h"
#include "cpu/prelu_grad_cpu.h"

namespace {

using namespace dpfast;

// Uniform in [-1, 1), from a linear congruential generator.
std::vector<float> numbers(std::int64_t count) {
  std::vector<float> values(static_cast<std::size_t>(count));
  std::uint32_t state = 1;
  for (float& value : values) {
    state = state * 1664525u + 1013904223u;
    value = static_cast<float>(static_cast<std::int32_t>(state)) * 0x1p-31f;
  }
  return values;
}

std::vector<std::uint16_t> halves(std::int64_t count) {
  std::vector<std::uint16_t> values;
  for (const float value : numbers(count)) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    values.push_back(static_cast<std::uint16_t>(bits >> 16));
  }
  return values;
}

struct Work {
  std::int64_t elements;
  std::function<void()> run;
};

Work clip_and_noise(std::int64_t rows, std::int64_t numel, DType dtype, math::Mechanism mechanism,
                    std::int64_t rows_per_unit) {
  struct State {
    std::vector<float> singles;
    std::vector<std::uint16_t> halves;
    std::vector<float> out;
    Tensor tensor{};
    std::vector<std::int64_t> row_order, unit_start, unit_count;
    std::vector<double> bound, threshold, norms, workspace;
    std::int64_t nonfinite = 0;
    std::vector<std::int64_t> noise{1, 2, 3, 4, 5};
    ClipAndNoise call{};
  };
  auto state = std::make_shared<State>();
  State& s = *state;
  const void* grad = nullptr;
  if (dtype == DType::kFloat32) {
    s.singles = numbers(rows * numel);
    grad = s.singles.data();
  } else {
    s.halves = halves(rows * numel);
    grad = s.halves.data();
  }
  s.out.resize(static_cast<std::size_t>(numel));
  s.tensor = {grad, s.out.data(), numel, numel, dtype, 0, false};
  ClipAndNoise& call = s.call;
  call.tensors = &s.tensor;
  call.num_tensors = 1;
  call.num_rows = call.num_units = rows;
  call.num_groups = 1;
  if (rows_per_unit > 1) {
    const std::int64_t units = rows / rows_per_unit;
    for (std::int64_t row = 0; row < rows; ++row) s.row_order.push_back(row);
    for (std::int64_t unit = 0; unit <= rows; ++unit) {
      s.unit_start.push_back(std::min(unit, units) * rows_per_unit);
    }
    s.unit_count = {units};
    call.row_order = s.row_order.data();
    call.unit_start = s.unit_start.data();
    call.unit_count = s.unit_count.data();
  }
  s.bound = {1.0};
  s.threshold.resize(1);
  s.norms.resize(static_cast<std::size_t>(rows));
  call.clipping = math::Clipping::kFlat;
  call.norm = Norm::kL2;
  call.percentile = -1.0;
  call.bounds = s.bound.data();
  call.margin = math::kNormMargin;
  call.mechanism = mechanism;
  call.noise_multiplier = mechanism == math::Mechanism::kNone ? 0.0 : 1.0;
  call.noise_state = s.noise.data();
  call.divisor = 1.0;
  call.threshold = s.threshold.data();
  call.norms = s.norms.data();
  call.nonfinite = &s.nonfinite;
  call.until = Until::kEnd;
  s.workspace.resize(
      static_cast<std::size_t>(cpu::workspace_bytes(count_chunks(numel), rows, 1) / 8 + 1));
  call.workspace = s.workspace.data();
  return {rows * numel, [state] { cpu::clip_and_noise(state->call, 1); }};
}

Work noise(math::Mechanism mechanism) {
  constexpr std::int64_t kCount = 1 << 16;
  auto out = std::make_shared<std::vector<float>>(kCount);
  return {kCount, [out, mechanism] {
            const math::NoiseStream stream{{1, 2, 3, 4, 5, 6, 7, 8}, 9};
            cpu::fill_noise(stream, 0, mechanism, kCount, out->data(), nullptr, 1);
          }};
}

// "Elements" are products: samples * channels * channels * taps * positions.
Work conv_grad(std::int64_t m, std::int64_t n, std::vector<std::int64_t> size) {
  struct State {
    std::vector<float> anchor, moving, out;
    ConvGrad conv{};
  };
  auto state = std::make_shared<State>();
  ConvGrad& conv = state->conv;
  conv.samples = 2;
  conv.groups = 1;
  conv.m = m;
  conv.n = n;
  std::int64_t positions = 1, taps = 1;
  for (int axis = 0; axis < kConvAxes; ++axis) {
    const std::int64_t kernel = size[axis] == 1 ? 1 : 3;
    conv.anchor_size[axis] = conv.moving_size[axis] = size[axis];
    conv.kernel[axis] = kernel;
    conv.stride[axis] = conv.dilation[axis] = 1;
    conv.padding[axis] = kernel / 2;
    positions *= size[axis];
    taps *= kernel;
  }
  conv.out_m_stride = n * taps;
  conv.out_n_stride = taps;
  state->anchor = numbers(conv.samples * m * positions);
  state->moving = numbers(conv.samples * n * positions);
  state->out.resize(static_cast<std::size_t>(conv.samples * m * n * taps));
  conv.anchor = state->anchor.data();
  conv.moving = state->moving.data();
  conv.out = state->out.data();
  return {conv.samples * m * n * taps * positions, [state] { cpu::conv_grad(state->conv, 1); }};
}

Work prelu_grad() {
  constexpr std::int64_t kRows = 16, kLength = 4096;
  struct State {
    std::vector<float> x = numbers(kRows * kLength), grad = numbers(kRows * kLength);
    std::vector<float> grad_x = std::vector<float>(kRows * kLength), sums = grad_x, slopes{0.25f};
  };
  auto s = std::make_shared<State>();
  return {kRows * kLength, [s] {
            cpu::prelu_grad(s->x.data(), s->grad.data(), s->slopes.data(), s->grad_x.data(),
                            s->sums.data(), kRows, 1, kLength, 1);
          }};
}

enum class Pass { kResult, kIndex, kBackward };

// A closing; a mask is a disk.
Work closing(std::vector<std::int64_t> size, std::int64_t window, Pass pass, bool disk = false) {
  struct State {
    std::vector<float> x, grad, out;
    std::vector<std::int16_t> index;
    Morphology call{};
  };
  auto state = std::make_shared<State>();
  Morphology& call = state->call;
  call.batch = call.channels = 1;
  MorphologyStage dilation{};
  dilation.dilate = true;
  dilation.kind = disk ? ElementKind::kFlat : ElementKind::kBox;
  for (int axis = 0; axis < kSpatialAxes; ++axis) {
    call.size[axis] = size[axis];
    const std::int64_t radius = size[axis] == 1 ? 0 : window / 2;
    dilation.low[axis] = -radius;
    dilation.high[axis] = radius;
    call.reach[axis] = 2 * radius;
  }
  for (std::int64_t y = -window / 2; disk && y <= window / 2; ++y) {
    std::int64_t half = 0;
    while (4 * ((half + 1) * (half + 1) + y * y) <= window * window) ++half;
    dilation.runs.push_back({0, static_cast<std::int32_t>(y), static_cast<std::int32_t>(-half),
                             static_cast<std::int32_t>(2 * half + 1)});
  }
  MorphologyStage erosion = dilation;
  erosion.dilate = false;
  call.programs = {{MorphologyTerm{1, {dilation, erosion}}}};
  call.program_of_channel = {0};
  call.border = Border::kGeodesic;
  call.dtype = DType::kFloat32;
  state->x = numbers(call.volume());
  state->grad = numbers(call.volume());
  state->out.resize(state->x.size());
  state->index.resize(state->x.size());
  call.input = state->x.data();
  call.output = state->out.data();
  call.index_bits = 16;
  if (pass != Pass::kResult) call.index = state->index.data();
  if (pass == Pass::kBackward) {
    cpu::morphology(call, 1);
    return {call.volume(), [state] {
              cpu::morphology_backward(state->call, {state->grad.data(), state->out.data()}, 1);
            }};
  }
  return {call.volume(), [state] { cpu::morphology(state->call, 1); }};
}

using Maker = std::function<Work()>;

std::vector<std::pair<std::string, Maker>> cases() {
  const auto clip = [](std::int64_t rows, DType dtype, math::Mechanism mechanism,
                       std::int64_t rows_per_unit) {
    return [=] { return clip_and_noise(rows, 1 << 14, dtype, mechanism, rows_per_unit); };
  };
  const auto none = math::Mechanism::kNone, gaussian = math::Mechanism::kGaussian;
  const std::vector<std::int64_t> image{1, 128, 128}, volume{32, 32, 32};
  return {
      {"clip", clip(16, DType::kFloat32, none, 1)},
      {"clip, bfloat16", clip(16, DType::kBFloat16, none, 1)},
      {"clip, 4 rows a unit", clip(16, DType::kFloat32, none, 4)},
      {"clip and noise", clip(16, DType::kFloat32, gaussian, 1)},
      {"Gaussian noise", [=] { return noise(gaussian); }},
      {"Laplace noise", [] { return noise(math::Mechanism::kLaplace); }},
      {"conv_grad, 3x3", [=] { return conv_grad(16, 16, {1, 32, 32}); }},
      {"conv_grad, 3x3x3", [=] { return conv_grad(16, 8, {12, 12, 12}); }},
      {"prelu_grad", prelu_grad},
      {"closing of 3", [=] { return closing(image, 3, Pass::kResult); }},
      {"closing of 7", [=] { return closing(image, 7, Pass::kResult); }},
      {"closing of 15", [=] { return closing(image, 15, Pass::kResult); }},
      {"closing of 3, index", [=] { return closing(image, 3, Pass::kIndex); }},
      {"closing of 15, index", [=] { return closing(image, 15, Pass::kIndex); }},
      {"closing of 3, backward", [=] { return closing(image, 3, Pass::kBackward); }},
      {"closing of a disk of 15", [=] { return closing(image, 15, Pass::kResult, true); }},
      {"closing of 3, volume", [=] { return closing(volume, 3, Pass::kResult); }},
      {"closing of 3, volume, backward", [=] { return closing(volume, 3, Pass::kBackward); }},
  };
}

}  // namespace

int main(int argc, char** argv) {
  const auto all = cases();
  if (argc == 2 && std::strcmp(argv[1], "--compiler") == 0) {
    std::printf("%s\n", __VERSION__);
    return 0;
  }
  if (argc == 1) {
    for (const auto& each : all) std::printf("%s\n", each.first.c_str());
    return 0;
  }
  for (const auto& [name, make] : all) {
    if (argc != 3 || name != argv[1]) continue;
    const Work work = make();
    for (long i = 0; i < std::atol(argv[2]); ++i) work.run();
    std::printf("%lld\n", static_cast<long long>(work.elements));
    return 0;
  }
  std::fprintf(stderr,
               "usage: %s [--compiler | CASE REPEATS]; without arguments, lists the cases\n",
               argv[0]);
  return 2;
}
