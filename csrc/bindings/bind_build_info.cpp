// What this build has: for `dpfast doctor` and the benchmark records.
#include "bindings/call_arguments.h"
#include "bindings/module.h"
#include "cpu/kernels.h"
#if defined(DPFAST_WITH_CUDA)
#include "cuda/device_info.h"
#endif

namespace dpfast::bindings {

void bind_build_info(py::module_& module) {
  cpu::kernels();  // an unusable DPFAST_FORCE_ISA fails at import, not in the first private step
  module.def("instruction_set", [] { return std::string(cpu::kernels().name); });
  module.attr("__version__") = DPFAST_VERSION;
#if defined(DPFAST_WITH_CUDA)
  module.attr("cuda_architectures") = DPFAST_CUDA_ARCHITECTURES;
  module.attr("cuda_toolkit") = cuda::toolkit_version();
  module.def("cuda_driver_version", &cuda::driver_version);
#else
  module.attr("cuda_architectures") = py::none();
  module.attr("cuda_toolkit") = py::none();
#endif
}

}  // namespace dpfast::bindings
