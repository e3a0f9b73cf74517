#include "bindings/module.h"

PYBIND11_MODULE(_core, module) {
  module.doc() = "Native kernels of dpfast. Private: dpfast/_native.py is its only importer.";
  dpfast::bindings::bind_tensors(module);
  dpfast::bindings::bind_clip_and_noise(module);
  dpfast::bindings::bind_grad_sample(module);
  dpfast::bindings::bind_morphology(module);
  dpfast::bindings::bind_noise(module);
  dpfast::bindings::bind_build_info(module);
}
