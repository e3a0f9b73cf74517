// The noise generator by itself: for tests, `dpfast doctor` and the benchmarks.
#include <algorithm>
#include <array>
#include <atomic>

#include "bindings/call_arguments.h"
#include "bindings/module.h"
#include "cpu/clip_and_noise_cpu.h"
#include "cpu/kernels.h"
#include "cpu/noise_stream.h"
#include "cpu/thread_pool.h"
#if defined(DPFAST_WITH_CUDA)
#include "cuda/clip_and_noise_cuda.h"
#endif

namespace dpfast::bindings {
namespace {

using Key = std::array<std::uint32_t, math::kChaChaKeyWords>;

math::NoiseStream make_stream(const Key& key, std::uint64_t step) {
  math::NoiseStream stream{};
  for (int i = 0; i < math::kChaChaKeyWords; ++i) stream.key[i] = key[i];
  stream.step = step;
  return stream;
}

math::Mechanism noise_mechanism(int mechanism) {
  if (mechanism != static_cast<int>(math::Mechanism::kGaussian) &&
      mechanism != static_cast<int>(math::Mechanism::kLaplace)) {
    throw std::invalid_argument("noise: unknown mechanism");
  }
  return static_cast<math::Mechanism>(mechanism);
}

}  // namespace

void bind_noise(py::module_& module) {
  module.def(
      "chacha20_block",
      [](const Key& key, std::uint32_t counter, const std::array<std::uint32_t, 3>& nonce) {
        std::array<std::uint32_t, math::kChaChaWords> words{};
        math::Nothing nothing;
        math::chacha20_block<math::ScalarOps>(key.data(), counter, nonce[0], nonce[1], nonce[2],
                                              words.data(), nothing);
        return words;
      },
      py::arg("key"), py::arg("counter"), py::arg("nonce"));
  module.def(
      "fill_noise_cpu",
      [](const Key& key, std::uint64_t step, std::uint32_t tensor, int mechanism,
         std::int64_t count, std::uint64_t out, bool double_precision, int num_threads) {
        const math::NoiseStream stream = make_stream(key, step);
        const math::Mechanism chosen = noise_mechanism(mechanism);
        py::gil_scoped_release release;
        cpu::fill_noise(stream, tensor, chosen, count,
                        double_precision ? nullptr : pointer<float>(out),
                        double_precision ? pointer<double>(out) : nullptr, num_threads);
      },
      py::arg("key"), py::arg("step"), py::arg("tensor"), py::arg("mechanism"), py::arg("count"),
      py::arg("out"), py::arg("double_precision"), py::arg("num_threads"));
  module.def(
      "random_words_cpu",
      [](std::uint64_t noise_state, std::int64_t count, std::uint64_t out) {
        // One step's keystream: RFC 8439 counts its 64-byte blocks with 32 bits.
        if (count < 0 || count > (std::int64_t{1} << 35)) {
          throw std::invalid_argument("random_words: count must be in [0, 2^35]");
        }
        py::gil_scoped_release release;
        const math::NoiseStream stream = cpu::take_stream(pointer<std::int64_t>(noise_state));
        cpu::random_words(stream, count, pointer<std::uint64_t>(out));
      },
      py::arg("noise_state"), py::arg("count"), py::arg("out"));
  module.def(
      "read_all_cpu",
      [](std::uint64_t data, std::int64_t bytes, int num_threads) {
        py::gil_scoped_release release;
        constexpr std::int64_t kPiece = std::int64_t{1} << 20;
        std::atomic<std::uint64_t> total{0};
        cpu::parallel_for((bytes + kPiece - 1) / kPiece, num_threads, [&](std::int64_t i) {
          total += cpu::kernels().read_all(pointer<const char>(data) + i * kPiece,
                                           std::min(kPiece, bytes - i * kPiece));
        });
        return total.load();
      },
      py::arg("data"), py::arg("bytes"), py::arg("num_threads"));
  module.def(
      "multiply_add_cpu",
      [](std::int64_t rounds, int num_threads) {
        py::gil_scoped_release release;
        std::atomic<std::int64_t> total{0};
        cpu::parallel_for(num_threads, num_threads, [&](std::int64_t) {
          std::int64_t operations = 0;
          const float sum = cpu::kernels().multiply_add(rounds, &operations);
          if (sum == sum) total += operations;  // always: the sum must be wanted by somebody
        });
        return total.load();
      },
      py::arg("rounds"), py::arg("num_threads"));
}

}  // namespace dpfast::bindings
