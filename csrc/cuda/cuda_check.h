// Every CUDA call and launch is checked; an error names the call and carries CUDA's own words.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace dpfast::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("dpfast: ") + what + ": " + cudaGetErrorString(status));
  }
}

// Makes a device current for this thread and puts the former one back. The module links its own
// copy of the CUDA runtime, which does not know what Torch's copy has selected.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&former_), "cudaGetDevice");
    check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() { (void)cudaSetDevice(former_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int former_ = 0;
};

}  // namespace dpfast::cuda
