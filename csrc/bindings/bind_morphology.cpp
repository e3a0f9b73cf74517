#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/call_arguments.h"
#include "bindings/module.h"
#include "bindings/morphology_program.h"
#include "cpu/morphology_cpu.h"
#if defined(DPFAST_WITH_CUDA)
#include "cuda/morphology_cuda.h"
#endif

namespace dpfast::bindings {
namespace {

using Numbers = std::vector<std::int64_t>;
using Values = std::vector<double>;

Morphology with_tensors(const Numbers& shape, const Numbers& program, const Values& values,
                        int dtype, std::uint64_t index, int index_bits) {
  Morphology call = read_morphology(shape, program, values);
  call.dtype = static_cast<DType>(checked_enum(dtype, 4, "dtype"));
  call.index = pointer<void>(index);
  call.index_bits = index_bits;
  return call;
}

}  // namespace

void bind_morphology(py::module_& module) {
  module.def(
      "morphology_cpu",
      [](std::uint64_t input, std::uint64_t output, std::uint64_t index, int index_bits, int dtype,
         const Numbers& shape, const Numbers& program, const Values& values, int num_threads) {
        Morphology call = with_tensors(shape, program, values, dtype, index, index_bits);
        call.input = pointer<const void>(input);
        call.output = pointer<void>(output);
        py::gil_scoped_release release;
        cpu::morphology(call, num_threads);
      },
      py::arg("input"), py::arg("output"), py::arg("index"), py::arg("index_bits"),
      py::arg("dtype"), py::arg("shape"), py::arg("program"), py::arg("values"),
      py::arg("num_threads"));
  module.def(
      "morphology_backward_cpu",
      [](std::uint64_t grad_output, std::uint64_t grad_input, std::uint64_t index, int index_bits,
         int dtype, const Numbers& shape, const Numbers& program, const Values& values,
         int num_threads) {
        const Morphology call = with_tensors(shape, program, values, dtype, index, index_bits);
        const MorphologyBackward grads{pointer<const void>(grad_output), pointer<void>(grad_input)};
        py::gil_scoped_release release;
        cpu::morphology_backward(call, grads, num_threads);
      },
      py::arg("grad_output"), py::arg("grad_input"), py::arg("index"), py::arg("index_bits"),
      py::arg("dtype"), py::arg("shape"), py::arg("program"), py::arg("values"),
      py::arg("num_threads"));
#if defined(DPFAST_WITH_CUDA)
  module.def(
      "morphology_cuda_workspace_bytes",
      [](std::uint64_t index, int index_bits, int dtype, const Numbers& shape,
         const Numbers& program, const Values& values, int device) {
        return cuda::morphology_workspace_bytes(
            with_tensors(shape, program, values, dtype, index, index_bits), device);
      },
      py::arg("index"), py::arg("index_bits"), py::arg("dtype"), py::arg("shape"),
      py::arg("program"), py::arg("values"), py::arg("device"));
  module.def(
      "morphology_cuda",
      [](std::uint64_t input, std::uint64_t output, std::uint64_t index, int index_bits, int dtype,
         const Numbers& shape, const Numbers& program, const Values& values,
         std::uint64_t workspace, int device, std::uint64_t stream) {
        Morphology call = with_tensors(shape, program, values, dtype, index, index_bits);
        call.input = pointer<const void>(input);
        call.output = pointer<void>(output);
        py::gil_scoped_release release;
        cuda::morphology(call, pointer<void>(workspace), device, pointer<void>(stream));
      },
      py::arg("input"), py::arg("output"), py::arg("index"), py::arg("index_bits"),
      py::arg("dtype"), py::arg("shape"), py::arg("program"), py::arg("values"),
      py::arg("workspace"), py::arg("device"), py::arg("stream"));
  module.def(
      "morphology_backward_cuda",
      [](std::uint64_t grad_output, std::uint64_t grad_input, std::uint64_t index, int index_bits,
         int dtype, const Numbers& shape, const Numbers& program, const Values& values, int device,
         std::uint64_t stream) {
        const Morphology call = with_tensors(shape, program, values, dtype, index, index_bits);
        const MorphologyBackward grads{pointer<const void>(grad_output), pointer<void>(grad_input)};
        py::gil_scoped_release release;
        cuda::morphology_backward(call, grads, device, pointer<void>(stream));
      },
      py::arg("grad_output"), py::arg("grad_input"), py::arg("index"), py::arg("index_bits"),
      py::arg("dtype"), py::arg("shape"), py::arg("program"), py::arg("values"), py::arg("device"),
      py::arg("stream"));
#endif
}

}  // namespace dpfast::bindings
