// The tensors of one call, as addresses and sizes.
#pragma once

#include <cstdint>
#include <vector>

#include "math/clip_and_noise.h"

namespace dpfast::bindings {

struct TensorTable {
  std::vector<Tensor> tensors;  // every group 0: the call numbers them
  std::int64_t num_rows = 0;

  std::int64_t num_chunks() const {
    std::int64_t chunks = 0;
    for (const Tensor& tensor : tensors) chunks += count_chunks(tensor.numel);
    return chunks;
  }
};

}  // namespace dpfast::bindings
