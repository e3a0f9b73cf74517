// The CUDA morphology, emulated, against the CPU's on random problems of every kind.
#include "tests/cuda_on_host.h"
// The kernels and their launchers, compiled as host code.
#include "cuda/morphology.cu"
#include "cuda/morphology_backward.cu"

#include <cstdio>
#include <limits>
#include <random>
#include <string>

#include "cpu/morphology_cpu.h"
#include "tests/check.h"

namespace {

using namespace dpfast;

std::mt19937_64& generator() {
  static std::mt19937_64 engine(11);
  return engine;
}

int pick(int count) { return static_cast<int>(generator()() % static_cast<unsigned>(count)); }
double normal() { return std::normal_distribution<double>()(generator()); }

// Elements of one dtype, aligned for each.
struct Elements {
  DType dtype;
  std::vector<double> storage;

  Elements(DType of, std::int64_t count)
      : dtype(of), storage(static_cast<std::size_t>(count), -77.0) {}

  char* data() { return reinterpret_cast<char*>(storage.data()); }

  double at(std::int64_t i) const {
    const char* from = reinterpret_cast<const char*>(storage.data()) + i * item_size(dtype);
    double value;
    float single;
    __nv_bfloat16 brain;
    __half half;
    switch (dtype) {
      case DType::kFloat64:
        std::memcpy(&value, from, 8);
        return value;
      case DType::kFloat32:
        std::memcpy(&single, from, 4);
        return single;
      case DType::kBFloat16:
        std::memcpy(&brain, from, 2);
        return static_cast<float>(brain);
      default:
        std::memcpy(&half, from, 2);
        return static_cast<float>(half);
    }
  }

  void set(std::int64_t i, double value) {
    char* to = data() + i * item_size(dtype);
    const float single = static_cast<float>(value);
    const __nv_bfloat16 brain(single);
    const __half half(single);
    switch (dtype) {
      case DType::kFloat64:
        std::memcpy(to, &value, 8);
        break;
      case DType::kFloat32:
        std::memcpy(to, &single, 4);
        break;
      case DType::kBFloat16:
        std::memcpy(to, &brain, 2);
        break;
      default:
        std::memcpy(to, &half, 2);
    }
  }
};

// --- problems ---

int pick_reach(int n, bool near) {
  if (near) return pick(4);
  const int kind = pick(8);
  if (kind == 0) return 0;
  if (kind == 1) return pick(4 * n + 2);  // further than the image, several times
  if (kind == 2) return pick(40);
  return pick(5);
}

MorphologyStage pick_stage(const Morphology& call, bool boxes, bool near) {
  MorphologyStage stage{};
  stage.dilate = pick(2) == 0;
  stage.kind = boxes ? ElementKind::kBox : static_cast<ElementKind>(pick(3));
  const bool symmetric = pick(2) == 0;
  for (int axis = 0; axis < kSpatialAxes; ++axis) {
    if (axis == 0 && call.size[0] == 1) continue;
    const int n = static_cast<int>(call.size[axis]);
    stage.low[axis] = -pick_reach(n, near);
    stage.high[axis] = symmetric ? -stage.low[axis] : pick_reach(n, near);
    if (stage.kind != ElementKind::kBox) {
      stage.low[axis] = std::max<std::int64_t>(stage.low[axis], axis == 2 ? -600 : -9);
      stage.high[axis] = std::min<std::int64_t>(stage.high[axis], axis == 2 ? 600 : 9);
    }
  }
  if (stage.kind == ElementKind::kBox) return stage;
  // One offset in three, so that some elements lie to one side of their output.
  const int width = static_cast<int>(stage.high[2] - stage.low[2] + 1);
  for (std::int64_t d = stage.low[0]; d <= stage.high[0]; ++d) {
    for (std::int64_t h = stage.low[1]; h <= stage.high[1]; ++h) {
      const std::int32_t depth = static_cast<std::int32_t>(d), height = static_cast<int>(h);
      for (int w = pick(width + 1); w < width && pick(6) != 0; w += 2 + pick(5)) {
        const std::int32_t first = static_cast<std::int32_t>(stage.low[2]) + w;
        if (stage.kind == ElementKind::kFlat) {
          const std::int32_t length = 1 + pick(width - w);
          stage.runs.push_back({depth, height, first, length});
          w += length;
        } else {
          stage.taps.push_back({depth, height, first, 0.25 * normal()});
        }
      }
    }
  }
  if (stage.runs.empty() && stage.taps.empty()) {
    const std::int32_t first = static_cast<std::int32_t>(stage.high[2]);
    const std::int32_t row = static_cast<std::int32_t>(stage.low[1]);
    if (stage.kind == ElementKind::kFlat) {
      stage.runs.push_back({0, row, first, 1});
    } else {
      stage.taps.push_back({0, row, first, 0.5});
    }
  }
  return stage;
}

MorphologyProgram pick_program(const Morphology& call) {
  MorphologyProgram program;
  // Near boxes share a launch.
  const bool near = pick(3) == 0, boxes = near || pick(2) == 0;
  const int kind = pick(4), terms = kind == 0 ? 2 : kind == 1 ? 1 + pick(3) : 1;
  for (int t = 0; t < terms; ++t) {
    MorphologyTerm term{};
    term.sign = pick(3) == 0 ? -1 : 1;
    if (terms == 1 || pick(3) != 0) {
      const int stages = 1 + pick(near || pick(3) == 0 ? 4 : 2);
      for (int s = 0; s < stages; ++s) term.stages.push_back(pick_stage(call, boxes, near));
    }
    program.push_back(term);
  }
  return program;
}

void set_reach(Morphology& call) {
  for (const MorphologyProgram& program : call.programs) {
    for (const MorphologyTerm& term : program) {
      std::int64_t here[kSpatialAxes] = {0, 0, 0};
      for (const MorphologyStage& stage : term.stages) {
        for (int axis = 0; axis < kSpatialAxes; ++axis) {
          here[axis] += std::max(-stage.low[axis], stage.high[axis]);
        }
      }
      for (int axis = 0; axis < kSpatialAxes; ++axis) {
        call.reach[axis] = std::max(call.reach[axis], here[axis]);
      }
    }
  }
}

double pick_value(int kind) {
  constexpr double kInf = std::numeric_limits<double>::infinity();
  if (kind == 0) return pick(3) - 1;  // ties
  if (kind == 1 && pick(40) == 0) return std::numeric_limits<double>::quiet_NaN();
  if (kind == 1 && pick(20) == 0) return pick(2) ? kInf : -kInf;
  if (kind == 2) return pick(2) ? 0.0 : -0.0;
  return normal();
}

int boxes_seen = 0;  // of math/source_index.h

bool fits_16_bits(Morphology call) {
  call.index = &call;
  call.index_bits = 16;
  try {
    math::source_index(call);
    return true;
  } catch (const std::invalid_argument&) {
    return false;
  }
}

Morphology pick_call() {
  Morphology call{};
  call.batch = 1 + pick(2);
  call.channels = 1 + pick(3);
  const bool volumes = pick(3) == 0;
  call.size[0] = volumes ? 1 + pick(7) : 1;
  for (int axis = 1; axis < kSpatialAxes; ++axis) call.size[axis] = 1 + pick(volumes ? 14 : 40);
  if (pick(12) == 0) call.size[2] = 200 + pick(300);  // several tiles of a row
  if (pick(12) == 0) {                                // windows that no tile holds
    call.size[1] = 150 + pick(150);
    call.size[2] = 1 + pick(9);
  }
  if (pick(16) == 0) {  // whose sources are far away in memory
    call.channels = 1;
    call.size[0] = 8 + pick(3);
    for (int axis = 1; axis < kSpatialAxes; ++axis) call.size[axis] = 60 + pick(30);
  }
  call.border = static_cast<Border>(pick(6));
  call.border_value = pick(3) == 0 ? std::numeric_limits<double>::infinity() * (pick(2) ? 1 : -1)
                                   : 0.5 * pick(5) - 1.0;
  call.dtype = static_cast<DType>(pick(4));
  const int programs = 1 + pick(2);
  for (int p = 0; p < programs; ++p) call.programs.push_back(pick_program(call));
  for (std::int64_t c = 0; c < call.channels; ++c) {
    call.program_of_channel.push_back(pick(programs));
  }
  set_reach(call);
  call.index_bits = pick(3) != 0 && fits_16_bits(call) ? 16 : 32;
  call.index = &call;  // for the question alone
  boxes_seen += math::source_index(call).boxed ? 1 : 0;
  return call;
}

std::int64_t most_chains(const Morphology& call) {
  std::int64_t most = 0;
  for (const MorphologyProgram& program : call.programs) {
    std::int64_t chains = 0;
    for (const MorphologyTerm& term : program) chains += term.stages.empty() ? 0 : 1;
    most = std::max(most, chains);
  }
  return most;
}

// --- comparison ---

bool same(double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); }

bool same_elements(const Elements& a, const Elements& b, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    if (!same(a.at(i), b.at(i))) return false;
  }
  return true;
}

// The CPU has no float16: its results in float32 are what CUDA's must round to.
Elements rounded_to(DType dtype, const Elements& from, std::int64_t count) {
  Elements to(dtype, count);
  for (std::int64_t i = 0; i < count; ++i) to.set(i, from.at(i));
  return to;
}

// Sums of the same terms, up to thousands, in another order.
bool close_elements(const Elements& a, const Elements& b, std::int64_t count) {
  const double tolerance = a.dtype == DType::kFloat64    ? 1e-13
                           : a.dtype == DType::kFloat32  ? 1e-4
                           : a.dtype == DType::kBFloat16 ? 1e-2
                                                         : 2e-3;
  for (std::int64_t i = 0; i < count; ++i) {
    if (!(std::fabs(a.at(i) - b.at(i)) <= tolerance * (1.0 + std::fabs(a.at(i))))) return false;
  }
  return true;
}

// The gradient with each sum in the order of the outputs, as CUDA promises it.
template <class Sum>
Elements sums_in_order(const Morphology& call, const Elements& grad) {
  const std::int64_t volume = call.volume(), count = call.batch * call.channels * volume;
  const SourceIndex source = math::source_index(call);
  Elements result(grad.dtype, count);
  for (std::int64_t channel = 0; channel < call.batch * call.channels; ++channel) {
    std::vector<Sum> sums(static_cast<std::size_t>(volume), Sum{0});
    std::int64_t chains = 0;
    for (const MorphologyTerm& term : call.program(channel % call.channels)) {
      for (std::int64_t i = 0; i < volume; ++i) {
        std::int64_t way = 0;
        const std::int64_t at = chains * count + channel * volume + i;
        if (!term.stages.empty()) {
          const std::int32_t stored = call.index_bits == 32
                                          ? static_cast<const std::int32_t*>(call.index)[at]
                                          : static_cast<const std::int16_t*>(call.index)[at];
          if (stored == (call.index_bits == 32 ? INT32_MIN : INT16_MIN)) continue;
          way = math::source_distance(source, stored);
        }
        sums[i + way] += static_cast<Sum>(term.sign * grad.at(channel * volume + i));
      }
      chains += term.stages.empty() ? 0 : 1;
    }
    for (std::int64_t i = 0; i < volume; ++i) result.set(channel * volume + i, sums[i]);
  }
  return result;
}

void on_cuda(const Morphology& call) {
  const std::int64_t bytes = cuda::morphology_workspace_bytes(call, 0);
  std::vector<double> workspace(static_cast<std::size_t>(bytes / 8 + 2), -3.5);
  char* aligned = reinterpret_cast<char*>(
      (reinterpret_cast<std::uintptr_t>(workspace.data()) + 15) & ~std::uintptr_t{15});
  cuda::morphology(call, aligned, 0, nullptr);
}

void cuda_equals_cpu(int trial) {
  Morphology call = pick_call();
  const std::int64_t count = call.batch * call.channels * call.volume();
  const std::int64_t indices = most_chains(call) * count;
  const DType dtype = call.dtype;
  const DType cpu_dtype = dtype == DType::kFloat16 ? DType::kFloat32 : dtype;
  Elements input(dtype, count), grad(dtype, count);
  const int kind = pick(4);
  for (std::int64_t i = 0; i < count; ++i) {
    input.set(i, pick_value(kind));
    grad.set(i, normal());
  }
  Elements cpu_input = rounded_to(cpu_dtype, input, count);
  Elements cpu_grad = rounded_to(cpu_dtype, grad, count);
  emulation::backwards = trial % 2 == 1;
  emulation::most_shared_bytes = trial % 3 == 0 ? 227 << 10 : trial % 3 == 1 ? 99 << 10 : 48 << 10;
  const int before = tests::failures();
  std::vector<std::int32_t> index[2];
  for (const bool follow : {false, true}) {
    Elements cpu_output(cpu_dtype, count), cuda_output(dtype, count);
    for (auto& storage : index) storage.assign(static_cast<std::size_t>(indices) + 1, 1234567);
    call.dtype = cpu_dtype;
    call.input = cpu_input.data();
    call.output = cpu_output.data();
    call.index = follow ? index[0].data() : nullptr;
    cpu::morphology(call, 2);
    call.dtype = dtype;
    call.input = input.data();
    call.output = cuda_output.data();
    call.index = follow ? index[1].data() : nullptr;
    on_cuda(call);
    DPFAST_CHECK(same_elements(rounded_to(dtype, cpu_output, count), cuda_output, count));
    DPFAST_CHECK(index[0] == index[1]);
  }
  Elements cpu_result(cpu_dtype, count), cuda_result(dtype, count);
  call.dtype = cpu_dtype;
  call.index = index[0].data();
  cpu::morphology_backward(call, {cpu_grad.data(), cpu_result.data()}, 2);
  call.dtype = dtype;
  call.index = index[1].data();
  cuda::morphology_backward(call, {grad.data(), cuda_result.data()}, 0, nullptr);
  DPFAST_CHECK(close_elements(rounded_to(dtype, cpu_result, count), cuda_result, count));
  if (call.border != Border::kWrap) {  // whose order begins elsewhere
    const Elements expected = dtype == DType::kFloat64 ? sums_in_order<double>(call, grad)
                                                       : sums_in_order<float>(call, grad);
    DPFAST_CHECK(same_elements(expected, cuda_result, count));
  }
  if (tests::failures() == before) return;
  std::fprintf(stderr, "  trial %d: dtype %d border %d size %dx%dx%d channels %dx%d bits %d\n",
               trial, static_cast<int>(dtype), static_cast<int>(call.border),
               static_cast<int>(call.size[0]), static_cast<int>(call.size[1]),
               static_cast<int>(call.size[2]), static_cast<int>(call.batch),
               static_cast<int>(call.channels), call.index_bits);
  for (const MorphologyProgram& program : call.programs) {
    for (const MorphologyTerm& term : program) {
      std::fprintf(stderr, "    term %d:", term.sign);
      for (const MorphologyStage& stage : term.stages) {
        std::fprintf(stderr, " %s %d", stage.dilate ? "dilate" : "erode",
                     static_cast<int>(stage.kind));
        for (int axis = 0; axis < kSpatialAxes; ++axis) {
          std::fprintf(stderr, " [%d,%d]", static_cast<int>(stage.low[axis]),
                       static_cast<int>(stage.high[axis]));
        }
      }
      std::fprintf(stderr, "\n");
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int trials = argc > 1 ? std::stoi(argv[1]) : 300;
  for (int trial = 0; trial < trials && dpfast::tests::failures() < 20; ++trial) {
    cuda_equals_cpu(trial);
  }
  std::printf("morphology_on_host: %d of %d with indices in boxes\n", boxes_seen, trials);
  DPFAST_CHECK(trials < 300 || boxes_seen > 5);
  return dpfast::tests::report("morphology_on_host");
}
