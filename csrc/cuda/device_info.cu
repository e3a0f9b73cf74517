#include "cuda/device_info.h"

#include <cuda_runtime.h>

namespace dpfast::cuda {
namespace {

std::string text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

}  // namespace

std::string toolkit_version() { return text(CUDART_VERSION); }

std::optional<std::string> driver_version() {
  int version = 0;
  if (cudaDriverGetVersion(&version) != cudaSuccess || version == 0) return std::nullopt;
  return text(version);
}

}  // namespace dpfast::cuda
