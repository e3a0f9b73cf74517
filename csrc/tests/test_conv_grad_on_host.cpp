// conv_grad's CUDA kernels, emulated, against sums in float64 on random convolutions of every kind.
#include "tests/cuda_on_host.h"
#include "tests/tensor_cores_on_host.h"
// The kernels and their launcher, compiled as host code.
#include "cuda/conv_grad.cu"

#include <cstdio>
#include <limits>
#include <random>
#include <string>

#include "tests/check.h"

namespace dpfast::cuda {
namespace {

std::mt19937_64& generator() {
  static std::mt19937_64 engine(11);
  return engine;
}

std::int64_t pick(std::int64_t low, std::int64_t high) {  // both included
  return low + static_cast<std::int64_t>(generator()() % static_cast<unsigned>(high - low + 1));
}

constexpr float kUntouched = -12345.0f;
const float kNaN = std::numeric_limits<float>::quiet_NaN();

// A tensor in its own dtype between NaNs (a read beside it shows), and its values.
struct Values {
  std::vector<char> storage;
  const char* data = nullptr;
  std::vector<double> exact;

  void fill(std::int64_t count, DType dtype, std::int64_t shift) {
    const std::int64_t item = item_size(dtype), around = 64;
    storage.resize(static_cast<std::size_t>((count + 2 * around) * item + 32));
    char* start = storage.data();
    start += (16 - reinterpret_cast<std::uintptr_t>(start) % 16) % 16;
    char* base = start + (around + shift) * item;
    for (std::int64_t i = -around - shift; i < count + around - shift; ++i) {
      const bool inside = i >= 0 && i < count;
      const float value = inside ? std::normal_distribution<float>()(generator()) : kNaN;
      double stored = static_cast<double>(value);
      if (dtype == DType::kFloat32) {
        std::memcpy(base + i * item, &value, 4);
      } else if (dtype == DType::kBFloat16) {
        const __nv_bfloat16 low(value);
        std::memcpy(base + i * item, &low, 2);
        stored = static_cast<double>(static_cast<float>(low));
      } else {
        const __half low(value);
        std::memcpy(base + i * item, &low, 2);
        stored = static_cast<double>(static_cast<float>(low));
      }
      if (inside) exact.push_back(stored);
    }
    data = base;
  }
};

struct Case {
  ConvGrad conv{};
  ConvGradOptions options{};
  Values anchor, moving;
  int tile = -1;                     // -1: as planned
  std::int64_t split_positions = 0;  // 0: as planned
};

std::int64_t work(const ConvGrad& conv) {
  return conv.samples * conv.groups * std::max<std::int64_t>(16, conv.m) *
         std::max<std::int64_t>(32, conv.n * volume(conv.kernel)) * volume(conv.anchor_size);
}

void make_shape(ConvGrad& conv, std::int64_t most_work) {
  const std::int64_t channels[] = {1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 48, 64, 65, 70};
  do {
    const int axes = static_cast<int>(pick(1, 3));
    conv.samples = pick(1, 3);
    conv.groups = pick(0, 2) == 0 ? pick(2, 3) : 1;
    conv.m = channels[pick(0, 13)];
    conv.n = channels[pick(0, 13)];
    for (int axis = 0; axis < kConvAxes; ++axis) {
      const bool there = axis >= kConvAxes - axes;
      conv.kernel[axis] = there ? pick(1, 4) : 1;
      conv.stride[axis] = there ? pick(1, 3) : 1;
      conv.padding[axis] = there ? pick(0, 3) : 0;
      conv.dilation[axis] = there ? pick(1, 3) : 1;
      conv.anchor_size[axis] = there ? pick(1, axes == 1 ? 300 : axes == 2 ? 24 : 9) : 1;
      // Any size will do: beyond the tensor there are zeros.
      conv.moving_size[axis] =
          there
              ? std::max<std::int64_t>(1, conv.anchor_size[axis] * conv.stride[axis] + pick(-3, 6))
              : 1;
    }
  } while (work(conv) > most_work);
  const bool swapped = pick(0, 1) == 0;
  const std::int64_t taps = volume(conv.kernel);
  conv.out_m_stride = swapped ? taps : conv.n * taps;
  conv.out_n_stride = swapped ? conv.m * taps : taps;
  conv.flip_taps = swapped;
}

std::vector<double> expected_gradients(const Case& test, std::vector<double>& magnitudes) {
  const ConvGrad& c = test.conv;
  const std::int64_t taps = volume(c.kernel), positions = volume(c.anchor_size);
  const std::int64_t reach = volume(c.moving_size);
  std::vector<double> out(static_cast<std::size_t>(c.samples * c.groups * c.m * c.n * taps));
  magnitudes.resize(out.size());
  for (std::int64_t image = 0; image < c.samples * c.groups; ++image) {
    for (std::int64_t tap = 0; tap < taps; ++tap) {
      const std::int64_t at_tap[] = {tap / c.kernel[2] / c.kernel[1],
                                     tap / c.kernel[2] % c.kernel[1], tap % c.kernel[2]};
      for (std::int64_t p = 0; p < positions; ++p) {
        const std::int64_t at[] = {p / c.anchor_size[2] / c.anchor_size[1],
                                   p / c.anchor_size[2] % c.anchor_size[1], p % c.anchor_size[2]};
        std::int64_t index = 0;
        bool inside = true;
        for (int axis = 0; axis < kConvAxes; ++axis) {
          const std::int64_t moved =
              at[axis] * c.stride[axis] - c.padding[axis] + at_tap[axis] * c.dilation[axis];
          inside = inside && moved >= 0 && moved < c.moving_size[axis];
          index = index * c.moving_size[axis] + moved;
        }
        if (!inside) continue;
        for (std::int64_t m = 0; m < c.m; ++m) {
          const double factor = test.anchor.exact[(image * c.m + m) * positions + p];
          for (std::int64_t n = 0; n < c.n; ++n) {
            const std::size_t to =
                static_cast<std::size_t>(image * c.m * c.n * taps + m * c.out_m_stride +
                                         n * c.out_n_stride + (c.flip_taps ? taps - 1 - tap : tap));
            const double term = factor * test.moving.exact[(image * c.n + n) * reach + index];
            out[to] += term;
            magnitudes[to] += std::fabs(term);
          }
        }
      }
    }
  }
  return out;
}

struct Result {
  std::vector<float> out, sums;
  std::vector<double> norms;
};

Result solve(const Case& test, bool keeps_out, bool wants_sums, bool wants_norms) {
  ConvGrad conv = test.conv;
  Result result;
  const std::int64_t images = conv.samples * conv.groups;
  result.out.assign(static_cast<std::size_t>(images * conv.m * conv.n * volume(conv.kernel)) + 1,
                    kUntouched);
  result.sums.assign(static_cast<std::size_t>(images * conv.m) + 1, kUntouched);
  result.norms.assign(static_cast<std::size_t>(conv.samples) + 1, kUntouched);
  conv.anchor = reinterpret_cast<const float*>(test.anchor.data);
  conv.moving = reinterpret_cast<const float*>(test.moving.data);
  conv.out = keeps_out ? result.out.data() : nullptr;
  conv.anchor_sums = wants_sums ? result.sums.data() : nullptr;
  conv.square_norms = wants_norms ? result.norms.data() : nullptr;
  ConvGradOptions options = test.options;
  if (test.tile < 0) {
    const std::int64_t bytes = conv_grad_workspace_bytes(conv, options, 0);
    std::vector<double> workspace(static_cast<std::size_t>(bytes / 8 + 1), kNaN);
    options.workspace = workspace.data();
    conv_grad(conv, options, 0, nullptr);
    DPFAST_CHECK(std::isnan(workspace.back()));
    return result;
  }
  Plan plan = plan_for(conv, options, 0);
  plan.tile = test.tile;
  if (test.split_positions > 0) plan.split_positions = test.split_positions;
  const std::int64_t bytes = ConvLauncher(conv, options, plan, nullptr).workspace_bytes();
  std::vector<double> workspace(static_cast<std::size_t>(bytes / 8 + 1), kNaN);
  options.workspace = workspace.data();
  ConvLauncher(conv, options, plan, nullptr).run();
  DPFAST_CHECK(std::isnan(workspace.back()));
  return result;
}

void describe(const Case& test, const char* what) {
  const ConvGrad& c = test.conv;
  std::fprintf(
      stderr, "  %s: dtype %d tf32 %d tile %d split %lld samples %lld groups %lld m %lld n %lld",
      what, static_cast<int>(test.options.dtype), test.options.allow_tf32, test.tile,
      static_cast<long long>(test.split_positions), static_cast<long long>(c.samples),
      static_cast<long long>(c.groups), static_cast<long long>(c.m), static_cast<long long>(c.n));
  for (int axis = 0; axis < kConvAxes; ++axis) {
    std::fprintf(stderr, " [%lld of %lld k%lld s%lld p%lld d%lld]",
                 static_cast<long long>(c.anchor_size[axis]),
                 static_cast<long long>(c.moving_size[axis]),
                 static_cast<long long>(c.kernel[axis]), static_cast<long long>(c.stride[axis]),
                 static_cast<long long>(c.padding[axis]), static_cast<long long>(c.dilation[axis]));
  }
  std::fprintf(stderr, "\n");
}

void check_gradients(const Case& test, const Result& found, bool tf32) {
  const int before = tests::failures();
  std::vector<double> magnitudes;
  const std::vector<double> truth = expected_gradients(test, magnitudes);
  // Float32 sums of P terms: at most P 2^-24 of the sum of magnitudes, in practice far less. TF32
  // rounds each factor by at most 2^-11.
  const double rounding = 2e-6 + (tf32 ? 0x1p-10 * 1.001 : 0.0);
  bool close = true;
  for (std::size_t i = 0; i < truth.size(); ++i) {
    close = close && std::fabs(found.out[i] - truth[i]) <= rounding * magnitudes[i];
  }
  DPFAST_CHECK(close);
  DPFAST_CHECK(found.out.back() == kUntouched);
  const std::size_t positions = static_cast<std::size_t>(volume(test.conv.anchor_size));
  for (std::size_t channel = 0; channel + 1 < found.sums.size(); ++channel) {
    double sum = 0.0, magnitude = 0.0;
    for (std::size_t p = 0; p < positions; ++p) {
      sum += test.anchor.exact[channel * positions + p];
      magnitude += std::fabs(test.anchor.exact[channel * positions + p]);
    }
    DPFAST_CHECK(std::fabs(found.sums[channel] - sum) <= 1e-6 * magnitude);
  }
  const std::size_t of_sample = truth.size() / static_cast<std::size_t>(test.conv.samples);
  for (std::size_t sample = 0; sample < static_cast<std::size_t>(test.conv.samples); ++sample) {
    double squares = 0.0;  // of the very values that were stored
    for (std::size_t i = 0; i < of_sample; ++i) {
      squares += std::pow(static_cast<double>(found.out[sample * of_sample + i]), 2);
    }
    DPFAST_CHECK(std::fabs(found.norms[sample] - squares) <= 1e-13 * squares);
  }
  if (tests::failures() > before) describe(test, "found is wrong");
}

void conv_grad_equals_sums_in_float64(int trial) {
  Case test;
  make_shape(test.conv, 1 << 23);
  const int form = trial % 4;
  test.options.dtype = form < 2 ? DType::kFloat32 : form == 2 ? DType::kBFloat16 : DType::kFloat16;
  test.options.allow_tf32 = form != 0;
  const bool chooses = pick(0, 3) > 0;
  if (chooses) {
    test.tile = trial / 4 % kTiles;
    const std::int64_t lengths[] = {0, 32, 64, 96, 1 << 20};
    test.split_positions = lengths[pick(0, 4)];
  }
  const std::int64_t images = test.conv.samples * test.conv.groups;
  test.anchor.fill(images * test.conv.m * volume(test.conv.anchor_size), test.options.dtype,
                   pick(0, 1) * pick(0, 3));
  test.moving.fill(images * test.conv.n * volume(test.conv.moving_size), test.options.dtype,
                   pick(0, 1) * pick(0, 3));
  emulation::backwards = false;
  const Result found = solve(test, true, true, true);
  check_gradients(test, found, form == 1);

  const int before = tests::failures();
  emulation::backwards = true;
  const Result again = solve(test, true, true, true);
  DPFAST_CHECK(again.out == found.out);
  DPFAST_CHECK(again.sums == found.sums);
  DPFAST_CHECK(again.norms == found.norms);
  // Each result alone. Norms alone are never from TF32, even where it is allowed.
  const Result norms = solve(test, false, false, true);
  Case plain = test;
  plain.options.allow_tf32 = false;
  const Result exact = form == 1 ? solve(plain, true, true, true) : found;
  DPFAST_CHECK(norms.norms == exact.norms);
  DPFAST_CHECK(norms.out[0] == kUntouched && norms.sums[0] == kUntouched);
  const Result gradients = solve(test, true, false, false);
  DPFAST_CHECK(gradients.out == found.out);
  DPFAST_CHECK(gradients.sums[0] == kUntouched && gradients.norms[0] == kUntouched);
  if (tests::failures() > before) describe(test, "results differ between calls");
}

void padding_and_neighbours_never_leak() {
  // NaN in one sample's anchor leaves the other samples' gradients alone.
  Case test;
  test.conv = {};
  test.conv.samples = 3;
  test.conv.groups = 1;
  test.conv.m = 5;
  test.conv.n = 3;
  for (int axis = 0; axis < kConvAxes; ++axis) {
    test.conv.anchor_size[axis] = test.conv.moving_size[axis] = axis == 0 ? 1 : 7;
    test.conv.kernel[axis] = axis == 0 ? 1 : 3;
    test.conv.stride[axis] = test.conv.dilation[axis] = 1;
    test.conv.padding[axis] = axis == 0 ? 0 : 1;
  }
  test.conv.out_m_stride = 27;
  test.conv.out_n_stride = 9;
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    test.options.dtype = dtype;
    test.anchor = {};
    test.moving = {};
    test.anchor.fill(3 * 5 * 49, dtype, 0);
    test.moving.fill(3 * 3 * 49, dtype, 0);
    char* second = const_cast<char*>(test.anchor.data) + 5 * 49 * item_size(dtype);
    std::memset(second, 0xff, static_cast<std::size_t>(5 * 49 * item_size(dtype)));
    const Result found = solve(test, true, true, true);
    DPFAST_CHECK(std::isfinite(found.norms[0]) && std::isfinite(found.norms[2]));
    DPFAST_CHECK(std::isnan(found.norms[1]) && std::isnan(found.sums[5]));
  }
}

void empty_calls_give_zeros() {
  for (const int missing : {0, 1, 2, 3}) {
    Case test;
    make_shape(test.conv, 1 << 20);
    test.options.dtype = DType::kFloat32;
    if (missing == 0) test.conv.samples = 0;
    if (missing == 1) test.conv.anchor_size[2] = 0;
    if (missing == 2) test.conv.n = 0;
    if (missing == 3) test.conv.m = 0;
    const std::int64_t images = test.conv.samples * test.conv.groups;
    test.anchor.fill(images * test.conv.m * volume(test.conv.anchor_size), DType::kFloat32, 0);
    test.moving.fill(images * test.conv.n * volume(test.conv.moving_size), DType::kFloat32, 0);
    const Result found = solve(test, true, true, true);
    const auto zeros = [](const auto& values) {
      return std::all_of(values.begin(), values.end() - 1, [](auto x) { return x == 0; });
    };
    DPFAST_CHECK(zeros(found.out) && zeros(found.norms));
    DPFAST_CHECK(missing == 2 || zeros(found.sums));
  }
}

void long_contractions_are_split() {
  ConvGrad conv{};
  conv.samples = conv.groups = 1;
  conv.m = 16;
  conv.n = 8;
  for (int axis = 0; axis < kConvAxes; ++axis) {
    conv.anchor_size[axis] = conv.moving_size[axis] = 96;
    conv.kernel[axis] = 3;
    conv.stride[axis] = conv.dilation[axis] = conv.padding[axis] = 1;
  }
  const Plan plan(conv, Form::kFloat, 132);
  DPFAST_CHECK(plan.splits(conv) > 50);
  DPFAST_CHECK(plan.split_positions % 32 == 0 && plan.split_positions >= kLeastPositions);
  conv.samples = 4096;
  DPFAST_CHECK(Plan(conv, Form::kFloat, 132).splits(conv) == 1);
}

bool throws(const ConvGrad& conv, DType dtype) {
  try {
    conv_grad_workspace_bytes(conv, {dtype, false, nullptr}, 0);
  } catch (const std::invalid_argument&) {
    return true;
  }
  return false;
}

void what_does_not_fit_is_refused() {
  ConvGrad conv{};
  make_shape(conv, 1 << 20);
  DPFAST_CHECK(!throws(conv, DType::kFloat32));
  DPFAST_CHECK(throws(conv, DType::kFloat64));
  for (std::int64_t* size : {&conv.n, &conv.m, &conv.samples, &conv.anchor_size[0],
                             &conv.moving_size[2], &conv.stride[1], &conv.dilation[1]}) {
    const std::int64_t before = *size;
    *size = 1ll << 31;
    DPFAST_CHECK(throws(conv, DType::kFloat32));
    *size = before;
  }
}

void dividers_divide() {
  for (const std::uint32_t by :
       {1u, 2u, 3u, 5u, 7u, 27u, 96u, 255u, 256u, 9409u, 65537u, 1u << 30, (1u << 31) - 1}) {
    const Divider divider(by);
    for (int i = 0; i < 2000; ++i) {
      const std::int64_t n =
          i < 1000
              ? pick(0, kMaxInt)
              : std::min<std::int64_t>(
                    kMaxInt, std::max<std::int64_t>(0, pick(0, kMaxInt / by) * by + pick(-1, 1)));
      DPFAST_CHECK(divider.divide(static_cast<int>(n)) == n / by);
    }
  }
}

}  // namespace
}  // namespace dpfast::cuda

int main(int argc, char** argv) {
  using namespace dpfast::cuda;
  const int trials = argc > 1 ? std::stoi(argv[1]) : 96;
  dividers_divide();
  for (int trial = 0; trial < trials && dpfast::tests::failures() < 20; ++trial) {
    conv_grad_equals_sums_in_float64(trial);
  }
  padding_and_neighbours_never_leak();
  empty_calls_give_zeros();
  long_contractions_are_split();
  what_does_not_fit_is_refused();
  return dpfast::tests::report("conv_grad_on_host");
}
