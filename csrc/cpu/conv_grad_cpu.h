// Per-sample weight gradients of convolutions on the CPU. See math/conv_grad.h.
#pragma once

#include "math/conv_grad.h"

namespace dpfast::cpu {

void conv_grad(const ConvGrad& conv, int num_threads);
void ghost_norm(const GhostNorm& ghost, int num_threads);

}  // namespace dpfast::cpu
