// The inner loops that exist once per instruction set, and the table that holds them.
//
// All sets give the same bits: element j of a chunk is always added to virtual lane j % 32, in
// float64, without contraction to FMA.
#pragma once

#include <cstdint>

#include "math/clip_and_noise.h"

namespace dpfast::cpu {

struct Kernels {
  const char* name;

  // Sum over columns of f(sum over the given rows), f = square (L2) or absolute value (L1).
  // rows: [num_rows] pointers to the chunk's first column; length <= kChunk.
  double (*norm_part)(const void* const* rows, std::int64_t num_rows, std::int64_t length,
                      DType dtype, Norm norm);

  // accumulator[j] += sum_b weights[b] * rows[b][j], in the order of the rows.
  void (*weighted_sum)(const void* const* rows, const double* weights, std::int64_t num_rows,
                       std::int64_t length, DType dtype, double* accumulator);

  // Noise of elements [256 * group, 256 * group + 256) of a tensor, standard scale.
  void (*noise_single)(const math::NoiseStream& stream, std::uint32_t tensor, std::int64_t group,
                       math::Mechanism mechanism, float* out);
  void (*noise_double)(const math::NoiseStream& stream, std::uint32_t tensor, std::int64_t group,
                       math::Mechanism mechanism, double* out);

  // Reads everything once: the machine's read bandwidth, for the benchmarks.
  std::uint64_t (*read_all)(const void* data, std::int64_t bytes);
};

const Kernels& kernels_baseline();
#if defined(DPFAST_X86_KERNELS)
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
#endif

// The best set that this processor runs, chosen once; DPFAST_FORCE_ISA = baseline, avx2 or avx512
// overrides it (an unknown or unsupported name throws std::runtime_error).
const Kernels& kernels();

}  // namespace dpfast::cpu
