// clip_and_noise on CUDA. See math/clip_and_noise.h for what is computed.
#pragma once

#include <cstdint>

#include "math/clip_and_noise.h"

namespace dpfast::cuda {

std::int64_t workspace_bytes(std::int64_t num_chunks, std::int64_t num_units, int num_groups);

// Enqueues the call on the stream: no allocation, no copy to the host, no synchronisation.
// Throws std::runtime_error where a launch fails.
void clip_and_noise(const ClipAndNoise& call, int device, void* stream);

}  // namespace dpfast::cuda
