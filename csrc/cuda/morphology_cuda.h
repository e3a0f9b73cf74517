// Grey-scale morphology and its gradient on CUDA. See math/morphology.h for what is computed.
#pragma once

#include <cstdint>

#include "math/morphology.h"

namespace dpfast::cuda {

constexpr int kMostMorphologyTerms = 64;  // of a program

// Of `workspace`, aligned to 16 bytes. Throws std::invalid_argument where a program has too many
// terms.
std::int64_t morphology_workspace_bytes(const Morphology& call, int device);

// Enqueue the call on the stream: no allocation, no copy to the host, no synchronisation. Need
// compute capability 8.0. The same bits in every run. Throw std::runtime_error where a launch
// fails.
//
// Values (but for the sign of a zero) and indices are those of cpu::morphology.
void morphology(const Morphology& call, void* workspace, int device, void* stream);

// Reads call.index; needs no workspace.
void morphology_backward(const Morphology& call, const MorphologyBackward& grads, int device,
                         void* stream);

}  // namespace dpfast::cuda
