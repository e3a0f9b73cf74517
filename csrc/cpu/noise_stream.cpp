#include "cpu/noise_stream.h"

#include <algorithm>

#include "math/clip_and_noise.h"

namespace dpfast::cpu {

math::NoiseStream take_stream(std::int64_t* noise_state) {
  math::NoiseStream stream{};
  for (int i = 0; i < math::kChaChaKeyWords; ++i) {
    stream.key[i] = static_cast<std::uint32_t>(
        static_cast<std::uint64_t>(noise_state[kNoiseStateKey + i / 2]) >> (32 * (i % 2)));
  }
  // Atomic, so that two calls at once never share a step.
  stream.step = static_cast<std::uint64_t>(
      __atomic_fetch_add(&noise_state[kNoiseStateStep], std::int64_t{1}, __ATOMIC_SEQ_CST));
  return stream;
}

void random_words(const math::NoiseStream& stream, std::int64_t count, std::uint64_t* out) {
  constexpr std::int64_t kPerBlock = math::kChaChaWords / 2;
  std::uint32_t words[math::kChaChaWords];
  for (std::int64_t first = 0; first < count; first += kPerBlock) {
    const auto block = static_cast<std::uint32_t>(first / kPerBlock);
    math::noise_words<math::ScalarOps>(stream, 0, block, words);
    const std::int64_t here = std::min(kPerBlock, count - first);
    for (std::int64_t i = 0; i < here; ++i) {
      out[first + i] = words[2 * i] | (static_cast<std::uint64_t>(words[2 * i + 1]) << 32);
    }
  }
}

}  // namespace dpfast::cpu
