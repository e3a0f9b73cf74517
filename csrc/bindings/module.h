// The op families of the extension module.
#pragma once

#include <pybind11/pybind11.h>

namespace dpfast::bindings {

void bind_tensors(pybind11::module_& module);
void bind_clip_and_noise(pybind11::module_& module);
void bind_grad_sample(pybind11::module_& module);
void bind_morphology(pybind11::module_& module);
void bind_noise(pybind11::module_& module);
void bind_build_info(pybind11::module_& module);

}  // namespace dpfast::bindings
