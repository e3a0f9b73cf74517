#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>

#include "bindings/call_arguments.h"
#include "bindings/module.h"
#include "cpu/conv_grad_cpu.h"
#include "cpu/kernels.h"
#include "cpu/prelu_grad_cpu.h"
#if defined(DPFAST_WITH_CUDA)
#include "cuda/conv_grad_cuda.h"
#endif

namespace dpfast::bindings {
namespace {

using Axes = std::array<std::int64_t, kConvAxes>;

void copy(const Axes& from, std::int64_t* to, std::int64_t least, const char* name) {
  for (int axis = 0; axis < kConvAxes; ++axis) {
    if (from[axis] < least) {
      throw std::invalid_argument(std::string("conv_grad: ") + name + " is too small");
    }
    to[axis] = from[axis];
  }
}

template <class Settings>
void copy_shape(Settings& to, const Axes& anchor_size, const Axes& moving_size, const Axes& kernel,
                const Axes& stride, const Axes& padding, const Axes& dilation) {
  copy(anchor_size, to.anchor_size, 0, "anchor_size");
  copy(moving_size, to.moving_size, 0, "moving_size");
  copy(kernel, to.kernel, 1, "kernel");
  copy(stride, to.stride, 1, "stride");
  copy(padding, to.padding, 0, "padding");
  copy(dilation, to.dilation, 1, "dilation");
}

void run(std::uint64_t anchor, std::uint64_t moving, std::uint64_t out, std::uint64_t anchor_sums,
         std::uint64_t square_norms, std::int64_t samples, std::int64_t groups, std::int64_t m,
         std::int64_t n, const Axes& anchor_size, const Axes& moving_size, const Axes& kernel,
         const Axes& stride, const Axes& padding, const Axes& dilation, bool swapped,
         int num_threads) {
  ConvGrad conv{};
  conv.anchor = pointer<const float>(anchor);
  conv.moving = pointer<const float>(moving);
  conv.out = pointer<float>(out);
  conv.anchor_sums = pointer<float>(anchor_sums);
  conv.square_norms = pointer<double>(square_norms);
  conv.samples = samples;
  conv.groups = groups;
  conv.m = m;
  conv.n = n;
  copy_shape(conv, anchor_size, moving_size, kernel, stride, padding, dilation);
  const std::int64_t taps = volume(conv.kernel);
  conv.out_m_stride = swapped ? taps : n * taps;
  conv.out_n_stride = swapped ? m * taps : taps;
  conv.flip_taps = swapped;
  py::gil_scoped_release release;
  cpu::conv_grad(conv, num_threads);
}

void run_ghost(std::uint64_t anchor_gram, std::uint64_t moving_gram, std::uint64_t square_norms,
               std::int64_t samples, std::int64_t m, std::int64_t n, const Axes& anchor_size,
               const Axes& moving_size, const Axes& kernel, const Axes& stride, const Axes& padding,
               const Axes& dilation, int num_threads) {
  GhostNorm ghost{};
  ghost.anchor_gram = pointer<const double>(anchor_gram);
  ghost.moving_gram = pointer<const double>(moving_gram);
  ghost.square_norms = pointer<double>(square_norms);
  ghost.samples = samples;
  ghost.m = m;
  ghost.n = n;
  copy_shape(ghost, anchor_size, moving_size, kernel, stride, padding, dilation);
  py::gil_scoped_release release;
  cpu::ghost_norm(ghost, num_threads);
}

#if defined(DPFAST_WITH_CUDA)
// By keyword from dpfast/_native.py.
struct CudaConvCall {
  ConvGrad conv{};
  cuda::ConvGradOptions options{};

  explicit CudaConvCall(const py::dict& call) {
    const auto get = [&](const char* key) { return call[key]; };
    const auto address = [&](const char* key) { return get(key).cast<std::uint64_t>(); };
    const auto number = [&](const char* key) { return get(key).cast<std::int64_t>(); };
    conv.anchor = pointer<const float>(address("anchor"));
    conv.moving = pointer<const float>(address("moving"));
    conv.out = pointer<float>(address("out"));
    conv.anchor_sums = pointer<float>(address("anchor_sums"));
    conv.square_norms = pointer<double>(address("square_norms"));
    conv.samples = number("samples");
    conv.groups = number("groups");
    conv.m = number("m");
    conv.n = number("n");
    const auto axes = [&](const char* key) { return get(key).cast<Axes>(); };
    copy_shape(conv, axes("anchor_size"), axes("moving_size"), axes("kernel"), axes("stride"),
               axes("padding"), axes("dilation"));
    const bool swapped = get("swapped").cast<bool>();
    const std::int64_t taps = volume(conv.kernel);
    conv.out_m_stride = swapped ? taps : conv.n * taps;
    conv.out_n_stride = swapped ? conv.m * taps : taps;
    conv.flip_taps = swapped;
    options.dtype = static_cast<DType>(checked_enum(get("dtype").cast<int>(), 4, "dtype"));
    options.allow_tf32 = get("allow_tf32").cast<bool>();
    options.workspace = pointer<void>(address("workspace"));
  }
};
#endif

}  // namespace

void bind_grad_sample(py::module_& module) {
  module.def(
      "prelu_grad_cpu",
      [](std::uint64_t x, std::uint64_t grad, std::uint64_t slopes, std::uint64_t grad_x,
         std::uint64_t sums, std::int64_t rows, std::int64_t channels, std::int64_t length,
         int num_threads) {
        py::gil_scoped_release release;
        cpu::prelu_grad(pointer<const float>(x), pointer<const float>(grad),
                        pointer<const float>(slopes), pointer<float>(grad_x), pointer<float>(sums),
                        rows, channels, length, num_threads);
      },
      py::arg("x"), py::arg("grad"), py::arg("slopes"), py::arg("grad_x"), py::arg("sums"),
      py::arg("rows"), py::arg("channels"), py::arg("length"), py::arg("num_threads"));
  module.def("conv_lanes", [] { return cpu::kernels().conv_lanes; });
  module.def("conv_grad_cpu", &run, py::arg("anchor"), py::arg("moving"), py::arg("out"),
             py::arg("anchor_sums"), py::arg("square_norms"), py::arg("samples"), py::arg("groups"),
             py::arg("m"), py::arg("n"), py::arg("anchor_size"), py::arg("moving_size"),
             py::arg("kernel"), py::arg("stride"), py::arg("padding"), py::arg("dilation"),
             py::arg("swapped"), py::arg("num_threads"));
  module.def("ghost_norm_cpu", &run_ghost, py::arg("anchor_gram"), py::arg("moving_gram"),
             py::arg("square_norms"), py::arg("samples"), py::arg("m"), py::arg("n"),
             py::arg("anchor_size"), py::arg("moving_size"), py::arg("kernel"), py::arg("stride"),
             py::arg("padding"), py::arg("dilation"), py::arg("num_threads"));
#if defined(DPFAST_WITH_CUDA)
  module.def(
      "conv_grad_cuda_workspace_bytes",
      [](const py::dict& call, int device) {
        const CudaConvCall ready(call);
        return cuda::conv_grad_workspace_bytes(ready.conv, ready.options, device);
      },
      py::arg("call"), py::arg("device"));
  module.def(
      "conv_grad_cuda",
      [](const py::dict& call, int device, std::uint64_t stream) {
        const CudaConvCall ready(call);
        py::gil_scoped_release release;
        cuda::conv_grad(ready.conv, ready.options, device, pointer<void>(stream));
      },
      py::arg("call"), py::arg("device"), py::arg("stream"));
#endif
}

}  // namespace dpfast::bindings
