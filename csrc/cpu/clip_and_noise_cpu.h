// clip_and_noise on the CPU. See math/clip_and_noise.h for what is computed.
#pragma once

#include <cstdint>

#include "math/clip_and_noise.h"

namespace dpfast::cpu {

enum class Status {
  kOk,
  kBadBound,      // a bound read from memory is not finite and > 0
  kTooManyUnits,  // more distinct units than slots
};

bool usable_bound(double bound);  // finite and > 0

std::int64_t workspace_bytes(std::int64_t num_chunks, std::int64_t num_units, int num_groups);

// Writes to out and to the noise state only if it returns kOk.
Status clip_and_noise(const ClipAndNoise& call, int num_threads);

// Standard noise (scale 1) of elements [0, count) of one tensor.
void fill_noise(const math::NoiseStream& stream, std::uint32_t tensor, math::Mechanism mechanism,
                std::int64_t count, float* single, double* dual, int num_threads);

}  // namespace dpfast::cpu
