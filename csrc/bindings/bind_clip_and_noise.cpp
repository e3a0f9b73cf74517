#include "bindings/call_arguments.h"
#include "bindings/module.h"
#include "cpu/clip_and_noise_cpu.h"
#if defined(DPFAST_WITH_CUDA)
#include "cuda/clip_and_noise_cuda.h"
#endif

namespace dpfast::bindings {
namespace {

// The first unusable bound of those that the call has read from memory.
std::string bad_bound(const ClipAndNoise& call) {
  for (int g = 0; g < call.num_groups; ++g) {
    const double bound = call.device_bounds[g];
    if (!cpu::usable_bound(bound)) return py::repr(py::float_(bound)).cast<std::string>();
  }
  return "none";
}

void run_cpu(const TensorTable& tensors, const py::dict& settings, int num_threads) {
  CallArguments arguments;
  read_settings(tensors, settings, arguments);
  cpu::Status status;
  {
    py::gil_scoped_release release;
    status = cpu::clip_and_noise(arguments.call, num_threads);
  }
  if (status == cpu::Status::kBadBound) {
    throw std::invalid_argument("clip_and_noise: max_grad_norm must be finite and > 0, got " +
                                bad_bound(arguments.call));
  }
  if (status == cpu::Status::kTooManyUnits) {
    throw std::invalid_argument(
        "clip_and_noise: privacy_unit_ids has more distinct units than clipping or norms have "
        "entries");
  }
}

#if defined(DPFAST_WITH_CUDA)
void run_cuda(const TensorTable& tensors, const py::dict& settings, int device,
              std::uint64_t stream) {
  CallArguments arguments;
  read_settings(tensors, settings, arguments);
  py::gil_scoped_release release;
  cuda::clip_and_noise(arguments.call, device, pointer<void>(stream));
}
#endif

}  // namespace

void bind_clip_and_noise(py::module_& module) {
  module.def(
      "cpu_workspace_bytes",
      [](const TensorTable& tensors, std::int64_t units, int groups) {
        return cpu::workspace_bytes(tensors.num_chunks(), units, groups);
      },
      py::arg("tensors"), py::arg("num_units"), py::arg("num_groups"));
  module.def("clip_and_noise_cpu", &run_cpu, py::arg("tensors"), py::arg("settings"),
             py::arg("num_threads"));
#if defined(DPFAST_WITH_CUDA)
  module.def(
      "cuda_workspace_bytes",
      [](const TensorTable& tensors, std::int64_t units, int groups) {
        return cuda::workspace_bytes(tensors.num_chunks(), units, groups);
      },
      py::arg("tensors"), py::arg("num_units"), py::arg("num_groups"));
  module.def("clip_and_noise_cuda", &run_cuda, py::arg("tensors"), py::arg("settings"),
             py::arg("device"), py::arg("stream"));
#endif
}

}  // namespace dpfast::bindings
