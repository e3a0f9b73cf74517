// The noise state as CPU code uses it: the next step of its key, for noise or for plain words.
#pragma once

#include <cstdint>

#include "math/noise.h"

namespace dpfast::cpu {

// Takes the next step number of the state, int64 [kNoiseStateWords], atomically.
math::NoiseStream take_stream(std::int64_t* noise_state);

// count words of 64 bits, uniform and independent: the keystream of one step, tensor 0.
void random_words(const math::NoiseStream& stream, std::int64_t count, std::uint64_t* out);

}  // namespace dpfast::cpu
