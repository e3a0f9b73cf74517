// The CUDA kernels, emulated, against the CPU kernels on random problems of every kind.
#include "tests/cuda_on_host.h"
// The kernels and their launcher, compiled as host code.
#include "cuda/clip_and_noise.cu"

#include <cstdio>
#include <limits>
#include <random>
#include <string>

#include "cpu/clip_and_noise_cpu.h"
#include "tests/check.h"

namespace {

using namespace dpfast;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

std::mt19937_64& generator() {
  static std::mt19937_64 engine(7);
  return engine;
}

int pick(int count) { return static_cast<int>(generator()() % count); }
double normal() { return std::normal_distribution<double>()(generator()); }

struct Buffer {
  std::vector<double> storage;  // aligned for every dtype
  char* data() { return reinterpret_cast<char*>(storage.data()); }
};

void write_element(char* where, DType dtype, double value) {
  const float single = static_cast<float>(value);
  const __nv_bfloat16 brain(single);
  const __half half(single);
  switch (dtype) {
    case DType::kFloat64:
      std::memcpy(where, &value, 8);
      break;
    case DType::kFloat32:
      std::memcpy(where, &single, 4);
      break;
    case DType::kBFloat16:
      std::memcpy(where, &brain, 2);
      break;
    case DType::kFloat16:
      std::memcpy(where, &half, 2);
      break;
  }
}

// One call's inputs, and the results of one backend.
struct Problem {
  std::vector<Tensor> tensors;
  std::vector<Buffer> grads;
  std::vector<std::int64_t> row_order, unit_start, unit_count;
  std::vector<double> bounds, noise_weights, custom, given;
  ClipAndNoise call{};
};

struct Result {
  std::vector<std::vector<double>> out;  // bytes of float or double
  std::vector<double> threshold, norms;
  std::int64_t nonfinite = -1;
  std::vector<std::int64_t> state;
};

void make_tensors(Problem& problem) {
  ClipAndNoise& call = problem.call;
  const std::int64_t sizes[] = {0, 1, 3, 31, 255, 256, 300, 2047, 2048, 2049, 4096, 4100, 9001};
  call.num_rows = std::vector<int>{0, 1, 2, 5, 33, 150}[pick(6)];
  const int count = pick(8) == 0 ? 500 : 1 + pick(4);
  const bool mixed = pick(3) == 0;
  const DType common = static_cast<DType>(pick(4));
  problem.grads.resize(count);
  for (int k = 0; k < count; ++k) {
    const DType dtype = mixed ? static_cast<DType>(pick(4)) : common;
    const std::int64_t numel = count == 500 ? pick(40) : sizes[pick(13)];
    const std::int64_t gap = pick(2) ? 0 : pick(5);  // ragged, unaligned rows
    const std::int64_t stride = numel + gap, shift = pick(2) ? 0 : pick(4);
    problem.grads[k].storage.resize(shift + call.num_rows * stride + 1);
    char* base = problem.grads[k].data() + shift * item_size(dtype);
    for (std::int64_t b = 0; b < call.num_rows; ++b) {
      const double size = pick(12) == 0 ? 0.0 : std::pow(10.0, pick(4) - 2);
      for (std::int64_t j = 0; j < numel; ++j) {
        double value = size * normal();
        if (pick(20000) == 0) value = pick(2) ? kNaN : 1.0 / 0.0;
        write_element(base + (b * stride + j) * item_size(dtype), dtype, value);
      }
    }
    problem.tensors.push_back({base, nullptr, stride, numel, dtype, 0, false});
  }
}

void make_units(Problem& problem) {
  ClipAndNoise& call = problem.call;
  call.num_units = call.num_rows;
  if (pick(2)) return;
  const std::int64_t distinct = std::max<std::int64_t>(1, call.num_rows / 3);
  std::vector<std::vector<std::int64_t>> rows(call.num_rows);
  std::int64_t used = 0;
  std::vector<std::int64_t> rank(distinct, -1);
  for (std::int64_t b = 0; b < call.num_rows; ++b) {
    std::int64_t& unit = rank[pick(static_cast<int>(distinct))];
    if (unit < 0) unit = used++;
    rows[unit].push_back(b);
  }
  problem.unit_start.push_back(0);
  for (const auto& members : rows) {  // as many slots as rows: some are empty
    problem.row_order.insert(problem.row_order.end(), members.begin(), members.end());
    problem.unit_start.push_back(static_cast<std::int64_t>(problem.row_order.size()));
  }
  problem.row_order.push_back(0);  // so that data() is never null
  problem.unit_count = {used};
  call.row_order = problem.row_order.data();
  call.unit_start = problem.unit_start.data();
  call.unit_count = problem.unit_count.data();
  call.average_rows = pick(2) == 0;
}

void make_settings(Problem& problem) {
  ClipAndNoise& call = problem.call;
  const bool grouped = pick(2) == 0;
  call.num_groups = grouped ? static_cast<int>(problem.tensors.size()) : 1;
  for (std::size_t k = 0; k < problem.tensors.size(); ++k) {
    problem.tensors[k].group = grouped ? static_cast<int>(k) : 0;
  }
  call.clipping = static_cast<math::Clipping>(pick(7));
  call.stability = 0.1;
  call.norm = static_cast<Norm>(pick(2));
  call.margin = math::kNormMargin;
  call.percentile = -1.0;
  for (int g = 0; g < call.num_groups; ++g) {
    problem.bounds.push_back(0.5 + pick(5));
    problem.noise_weights.push_back(0.5 + pick(3));
  }
  if (!grouped && pick(3) == 0 && call.num_rows > 0) {
    call.percentile = 12.5 * pick(9);
  } else if (pick(4) == 0) {
    call.device_bounds = problem.bounds.data();
    if (pick(6) == 0) problem.bounds.back() = kNaN;
  } else {
    call.bounds = problem.bounds.data();
  }
  if (call.clipping == math::Clipping::kCustom) {
    for (std::int64_t u = 0; u < call.num_units; ++u) problem.custom.push_back(normal());
    problem.custom.push_back(0.0);
    call.custom_weights = problem.custom.data();
  }
  call.mechanism = static_cast<math::Mechanism>(pick(3));
  call.noise_multiplier = call.mechanism == math::Mechanism::kNone ? 0.0 : 0.5 * pick(3);
  if (grouped && pick(2)) {
    call.group_noise_weights = problem.noise_weights.data();
  } else {
    call.proportional_noise = pick(2) == 0;
  }
  call.divisor = 1.0 + pick(3);
  call.accumulate = pick(2) == 0;
  if (pick(4) == 0) {
    for (int i = 0; i < call.num_groups * call.num_units + 1; ++i) {
      problem.given.push_back(std::fabs(normal()) * 3.0);
      if (pick(30) == 0) problem.given.back() = kNaN;
    }
    call.given_norms = problem.given.data();
    for (Tensor& tensor : problem.tensors) {
      tensor.summed = call.num_rows > 0 && tensor.dtype <= DType::kFloat32 && pick(3) == 0;
    }
  }
  call.tensors = problem.tensors.data();
  call.num_tensors = static_cast<std::int64_t>(problem.tensors.size());
}

template <class Run>
Result solve(Problem problem, std::int64_t bytes, const Run& run) {
  ClipAndNoise& call = problem.call;
  Result result;
  for (std::size_t k = 0; k < problem.tensors.size(); ++k) {
    Tensor& tensor = problem.tensors[k];
    result.out.emplace_back(tensor.numel + 1, 0.0);
    for (std::int64_t j = 0; j < tensor.numel; ++j) {  // what accumulate adds to
      if (tensor.dtype == DType::kFloat64) {
        result.out[k][j] = 0.25 * static_cast<double>(j % 7);
      } else {
        reinterpret_cast<float*>(result.out[k].data())[j] = 0.25f * static_cast<float>(j % 7);
      }
    }
    tensor.out = result.out[k].data();
    if (tensor.summed) tensor.grad = tensor.out;
  }
  call.tensors = problem.tensors.data();
  result.threshold.assign(call.num_groups, -1.0);
  result.norms.assign(call.num_groups * call.num_units, -1.0);
  result.state = {1, -2, 3, 1ll << 40, 5};
  call.threshold = result.threshold.data();
  call.norms = result.norms.data();
  call.nonfinite = &result.nonfinite;
  call.noise_state = result.state.data();
  std::vector<double> workspace(bytes / sizeof(double) + 1, kNaN);
  call.workspace = workspace.data();
  run(call);
  return result;
}

bool close(double a, double b, double tolerance) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  return a == b || std::fabs(a - b) <= tolerance * (1.0 + std::fabs(a) + std::fabs(b));
}

double element(const Problem& problem, const Result& result, std::size_t k, std::int64_t j) {
  if (problem.tensors[k].dtype == DType::kFloat64) return result.out[k][j];
  return reinterpret_cast<const float*>(result.out[k].data())[j];
}

void compare(const Problem& problem, const Result& cpu, const Result& gpu, cpu::Status status,
             int trial) {
  const int before = tests::failures();
  DPFAST_CHECK(cpu.nonfinite == gpu.nonfinite || status == cpu::Status::kBadBound);
  DPFAST_CHECK(status == cpu::Status::kBadBound || cpu.state == gpu.state);
  for (std::size_t i = 0; i < cpu.norms.size(); ++i) {
    DPFAST_CHECK(close(cpu.norms[i], gpu.norms[i], 1e-14));
  }
  bool same = true;
  for (std::size_t k = 0; k < problem.tensors.size(); ++k) {
    const double tolerance = problem.tensors[k].dtype == DType::kFloat64 ? 1e-12 : 3e-7;
    for (std::int64_t j = 0; j < problem.tensors[k].numel; ++j) {
      const double got = element(problem, gpu, k, j);
      // The CPU refuses an unusable bound; on a device the output is NaN.
      same = same && (status == cpu::Status::kBadBound
                          ? std::isnan(got)
                          : close(element(problem, cpu, k, j), got, tolerance));
    }
  }
  DPFAST_CHECK(same);
  if (tests::failures() == before) return;
  const ClipAndNoise& call = problem.call;
  std::fprintf(stderr,
               "  trial %d: tensors %zu rows %lld units %d groups %d rule %d norm %d mechanism %d "
               "percentile %g given %d status %d\n",
               trial, problem.tensors.size(), static_cast<long long>(call.num_rows),
               call.unit_start != nullptr, call.num_groups, static_cast<int>(call.clipping),
               static_cast<int>(call.norm), static_cast<int>(call.mechanism), call.percentile,
               call.given_norms != nullptr, static_cast<int>(status));
}

// A call that ends at the weights: nothing is written, no noise is drawn.
void same_weights(Problem problem, std::int64_t chunks) {
  ClipAndNoise& call = problem.call;
  call.until = Until::kWeights;
  call.mechanism = math::Mechanism::kNone;
  call.noise_multiplier = 0.0;
  std::vector<double> weights[2];
  for (std::vector<double>& found : weights) {
    found.assign(call.num_groups * call.num_units + 1, -1.0);
    call.weights = found.data();
    const Result result = solve(problem,
                                cpu::workspace_bytes(chunks, call.num_units, call.num_groups) +
                                    cuda::workspace_bytes(chunks, call.num_units, call.num_groups),
                                [&](const ClipAndNoise& ready) {
                                  if (&found == weights) {
                                    cpu::clip_and_noise(ready, 2);
                                  } else {
                                    cuda::clip_and_noise(ready, 0, nullptr);
                                  }
                                });
    DPFAST_CHECK(result.state[kNoiseStateStep] == 5);
  }
  for (std::size_t i = 0; i < weights[0].size(); ++i) {
    DPFAST_CHECK(close(weights[0][i], weights[1][i], 1e-13));
  }
}

void cuda_equals_cpu(int trial) {
  Problem problem;
  make_tensors(problem);
  make_units(problem);
  make_settings(problem);
  std::int64_t chunks = 0;
  for (const Tensor& tensor : problem.tensors) chunks += count_chunks(tensor.numel);
  const ClipAndNoise& call = problem.call;
  cpu::Status status = cpu::Status::kOk;
  const Result on_cpu =
      solve(problem, cpu::workspace_bytes(chunks, call.num_units, call.num_groups),
            [&](const ClipAndNoise& ready) { status = cpu::clip_and_noise(ready, 2); });
  emulation::backwards = trial % 2 == 1;
  const Result on_gpu =
      solve(problem, cuda::workspace_bytes(chunks, call.num_units, call.num_groups),
            [&](const ClipAndNoise& ready) { cuda::clip_and_noise(ready, 0, nullptr); });
  compare(problem, on_cpu, on_gpu, status, trial);
  if (status == cpu::Status::kOk) same_weights(problem, chunks);
}

}  // namespace

int main(int argc, char** argv) {
  const int trials = argc > 1 ? std::stoi(argv[1]) : 60;
  for (int trial = 0; trial < trials && dpfast::tests::failures() < 20; ++trial) {
    cuda_equals_cpu(trial);
  }
  return dpfast::tests::report("cuda_on_host");
}
