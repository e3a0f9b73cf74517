// PReLU's backward pass with per-sample gradients of its slopes, on the CPU.
#pragma once

#include <cstdint>

namespace dpfast::cpu {

// x, grad, grad_x: [rows, length], row r of channel r % channels; slopes: [channels]. sums: [rows],
// of x * grad where x <= 0.
void prelu_grad(const float* x, const float* grad, const float* slopes, float* grad_x, float* sums,
                std::int64_t rows, std::int64_t channels, std::int64_t length, int num_threads);

}  // namespace dpfast::cpu
