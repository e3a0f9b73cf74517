#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/call_arguments.h"
#include "bindings/module.h"
#include "bindings/morphology_program.h"
#include "cpu/morphology_cpu.h"

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
}

}  // namespace dpfast::bindings
