// Floor: x and grad read once, grad_x written once.
#include "cpu/prelu_grad_cpu.h"

#include "cpu/kernels.h"
#include "cpu/thread_pool.h"

namespace dpfast::cpu {

void prelu_grad(const float* x, const float* grad, const float* slopes, float* grad_x, float* sums,
                std::int64_t rows, std::int64_t channels, std::int64_t length, int num_threads) {
  parallel_for(rows, num_threads, [&](std::int64_t row) {
    const std::int64_t at = row * length;
    sums[row] = static_cast<float>(
        kernels().prelu_grad(x + at, grad + at, slopes[row % channels], length, grad_x + at));
  });
}

}  // namespace dpfast::cpu
