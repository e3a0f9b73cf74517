// Grey-scale morphology and its gradient on the CPU.
#pragma once

#include "math/morphology.h"

namespace dpfast::cpu {

// Same results whatever the number of threads. Throws std::bad_alloc before anything is written.
void morphology(const Morphology& call, int num_threads);

// Reads call.index; the order of each sum is that of the outputs' indices.
void morphology_backward(const Morphology& call, const MorphologyBackward& grads, int num_threads);

}  // namespace dpfast::cpu
