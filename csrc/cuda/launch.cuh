// Starts a kernel and checks the launch. The host emulation of csrc/tests has its own version.
#pragma once

#include "cuda/cuda_check.h"

namespace dpfast::cuda {

#if !defined(DPFAST_CUDA_ON_HOST)
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int blocks, int threads,
            cudaStream_t stream, const Arguments&... arguments) {
  kernel<<<blocks, threads, 0, stream>>>(arguments...);
  check(cudaGetLastError(), name);
}
#endif

}  // namespace dpfast::cuda
