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

// The same with shared memory whose size is known at the launch; more than 48 KB must be asked for.
template <class... Parameters, class... Arguments>
void launch_with_shared(const char* name, void (*kernel)(Parameters...), int blocks, int threads,
                        int shared_bytes, cudaStream_t stream, const Arguments&... arguments) {
  if (shared_bytes > 48 << 10) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
          "cudaFuncSetAttribute");
  }
  kernel<<<blocks, threads, shared_bytes, stream>>>(arguments...);
  check(cudaGetLastError(), name);
}

// What a launch with shared memory has got of it.
__device__ inline char* dynamic_shared() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}
#endif

}  // namespace dpfast::cuda
