// The arguments of one call as Python passes them: addresses and sizes, no arithmetic.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/tensor_table.h"
#include "math/clip_and_noise.h"

namespace dpfast::bindings {

namespace py = pybind11;

template <class T>
T* pointer(std::uint64_t address) {
  return reinterpret_cast<T*>(static_cast<std::uintptr_t>(address));
}

// Owns what ClipAndNoise points to on the host.
struct CallArguments {
  std::vector<Tensor> tensors;
  std::vector<double> bounds;
  std::vector<double> group_noise_weights;
  ClipAndNoise call{};
};

inline int checked_enum(int value, int count, const char* name) {
  if (value < 0 || value >= count) {
    throw std::invalid_argument(std::string("clip_and_noise: unknown ") + name);
  }
  return value;
}

// Memory that is written must be read or written by nobody else. (dpfast/ops/_registration.py
// checks the originals of what it copied.)
inline void refuse_overlap(const CallArguments& arguments) {
  struct Span {
    std::uintptr_t start, stop;
    bool written;
  };
  std::vector<Span> spans;
  const std::int64_t rows = arguments.call.num_rows;
  for (const Tensor& tensor : arguments.tensors) {
    if (tensor.numel == 0) continue;
    const std::uintptr_t grad = reinterpret_cast<std::uintptr_t>(tensor.grad);
    const std::uintptr_t out = reinterpret_cast<std::uintptr_t>(tensor.out);
    const std::int64_t item = item_size(tensor.dtype);
    if (rows > 0 && !tensor.summed) {
      const std::int64_t reach = (rows - 1) * tensor.row_stride + tensor.numel;
      spans.push_back({grad, grad + static_cast<std::uintptr_t>(reach * item), false});
    }
    const std::int64_t out_item = tensor.dtype == DType::kFloat64 ? 8 : 4;
    spans.push_back({out, out + static_cast<std::uintptr_t>(tensor.numel * out_item), true});
  }
  std::sort(spans.begin(), spans.end(),
            [](const Span& a, const Span& b) { return a.start < b.start; });
  std::uintptr_t end = 0, written_end = 0;
  for (const Span& span : spans) {
    if (span.start < (span.written ? end : written_end)) {
      throw std::invalid_argument(
          "clip_and_noise: out must not share memory with itself or the input");
    }
    end = std::max(end, span.stop);
    if (span.written) written_end = std::max(written_end, span.stop);
  }
}

// Everything but the tensors, by keyword from dpfast/_native.py.
inline void read_settings(const TensorTable& table, const py::dict& settings,
                          CallArguments& arguments) {
  ClipAndNoise& call = arguments.call;
  const auto get = [&](const char* key) { return settings[key]; };
  const auto address = [&](const char* key) { return get(key).cast<std::uint64_t>(); };
  call.num_rows = table.num_rows;
  call.num_units = get("num_units").cast<std::int64_t>();
  call.num_groups = get("num_groups").cast<int>();
  call.row_order = pointer<const std::int64_t>(address("row_order"));
  call.unit_start = pointer<const std::int64_t>(address("unit_start"));
  call.unit_count = pointer<const std::int64_t>(address("unit_count"));
  call.average_rows = get("average_rows").cast<bool>();
  call.clipping =
      static_cast<math::Clipping>(checked_enum(get("clipping").cast<int>(), 7, "clipping"));
  call.stability = get("stability").cast<double>();
  call.norm = static_cast<Norm>(checked_enum(get("norm").cast<int>(), 2, "norm"));
  call.percentile = get("percentile").cast<double>();
  arguments.bounds = get("bounds").cast<std::vector<double>>();
  call.device_bounds = pointer<const double>(address("device_bounds"));
  call.given_norms = pointer<const double>(address("given_norms"));
  call.margin =
      get("single_precision_norms").cast<bool>() ? math::kGivenSingleNormMargin : math::kNormMargin;
  call.custom_weights = pointer<const double>(address("custom_weights"));
  call.mechanism =
      static_cast<math::Mechanism>(checked_enum(get("mechanism").cast<int>(), 3, "mechanism"));
  call.noise_multiplier = get("noise_multiplier").cast<double>();
  arguments.group_noise_weights = get("group_noise_weights").cast<std::vector<double>>();
  call.proportional_noise = get("proportional_noise").cast<bool>();
  call.noise_state = pointer<std::int64_t>(address("noise_state"));
  call.divisor = get("divisor").cast<double>();
  call.accumulate = get("accumulate").cast<bool>();
  call.threshold = pointer<double>(address("threshold"));
  call.norms = pointer<double>(address("norms"));
  call.nonfinite = pointer<std::int64_t>(address("nonfinite"));
  call.workspace = pointer<void>(address("workspace"));
  call.until = static_cast<Until>(checked_enum(get("until").cast<int>(), 3, "until"));
  call.weights = pointer<double>(address("weights"));

  arguments.tensors = table.tensors;
  for (std::size_t k = 0; call.num_groups > 1 && k < arguments.tensors.size(); ++k) {
    arguments.tensors[k].group = static_cast<int>(k);
  }
  call.tensors = arguments.tensors.data();
  call.num_tensors = static_cast<std::int64_t>(arguments.tensors.size());
  const std::size_t groups = static_cast<std::size_t>(call.num_groups);
  call.bounds = arguments.bounds.size() == groups ? arguments.bounds.data() : nullptr;
  call.group_noise_weights = arguments.group_noise_weights.size() == groups
                                 ? arguments.group_noise_weights.data()
                                 : nullptr;
  const bool noisy = call.mechanism != math::Mechanism::kNone && call.noise_multiplier != 0.0;
  if (noisy && call.noise_state == nullptr) {
    throw std::invalid_argument("clip_and_noise: noise needs a noise state");
  }
  if (call.percentile < 0.0 && call.bounds == nullptr && call.device_bounds == nullptr) {
    throw std::invalid_argument("clip_and_noise: one bound per group is needed");
  }
  for (const Tensor& tensor : arguments.tensors) {
    if (tensor.summed && (call.given_norms == nullptr || tensor.grad != tensor.out)) {
      throw std::invalid_argument(
          "clip_and_noise: summed gradients need given norms and stand in their output");
    }
  }
  if (call.until == Until::kEnd) refuse_overlap(arguments);
}

}  // namespace dpfast::bindings
