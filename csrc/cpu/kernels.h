// The inner loops that exist once per instruction set, and the table that holds them.
//
// All sets give the same bits: element j of a chunk is always added to virtual lane j % 32, in
// float64, and FMA is used only where the product is exact.
#pragma once

#include <cstdint>

#include "cpu/morphology_passes.h"
#include "math/clip_and_noise.h"
#include "math/conv_grad.h"

namespace dpfast::cpu {

// Memory to ask for while arithmetic runs: bytes [begin, end) of up to kRowsPerPass rows.
struct Prefetch {
  const void* const* rows;
  std::int64_t num_rows;
  std::int64_t begin;
  std::int64_t end;
};

// Rows that weighted_sum adds in one pass over the sums. Fewer do not keep enough reads in flight,
// and with 16 there are more streams than the prefetchers follow.
constexpr std::int64_t kRowsPerPass = 8;

// One thread's share of a call: some of a sample's anchor channels, with all moving channels.
struct ConvTask {
  std::int64_t sample, group;
  std::int64_t first_channel, num_channels;  // at most kernels().conv_channels
  std::int64_t block[2];                     // depths and heights taken at a time
};

// Of one thread, in elements.
struct ConvWorkspace {
  float* anchor;          // [positions of a block][channels]
  float* moving;          // [n][padded extent of a block]
  float* sums;            // [n][taps][channels]
  float* anchor_sums;     // [channels]
  std::int64_t* offsets;  // [n * depths * heights of the kernel]
  float** rows;           // as many
};

struct Kernels {
  const char* name;

  // Sum over a chunk's columns of f(sum over the given rows), f = square (L2) or absolute value
  // (L1). rows: [num_rows] pointers to the chunk's first column; length <= kChunk.
  double (*norm_part)(const void* const* rows, std::int64_t num_rows, std::int64_t length,
                      DType dtype, Norm norm);

  // sums[j] += sum_b weights[b] * rows[b][offset + j] for j < length, in the order of the rows.
  // The weights have at most 29 significant bits where the elements have 24 (see short_weight).
  // Of the first `ask_ahead` rows in `rows` (there may be more than num_rows), those that come next
  // are asked for meanwhile.
  void (*weighted_sum)(const void* const* rows, const double* weights, std::int64_t num_rows,
                       std::int64_t ask_ahead, std::int64_t offset, std::int64_t length,
                       DType dtype, double* sums);

  // sums[j] += weight * sum over the rows of one unit of rows[r][offset + j]: the rows first, as in
  // norm_part.
  void (*add_unit)(const void* const* rows, std::int64_t num_rows, double weight,
                   std::int64_t offset, std::int64_t length, DType dtype, double* sums);

  // sums[j] = scale * noise[j] + previous[j]; either may be null, and is then left out.
  void (*start_single)(const float* noise, double scale, const float* previous, std::int64_t length,
                       double* sums);
  void (*start_double)(const double* noise, double scale, const double* previous,
                       std::int64_t length, double* sums);

  // out[j] = sums[j] * factor, rounded once. Around the caches, lines are not read before
  // they are written.
  void (*finish_single)(const double* sums, double factor, std::int64_t length, bool around_caches,
                        float* out);
  void (*finish_double)(const double* sums, double factor, std::int64_t length, bool around_caches,
                        double* out);

  // Standard noise of elements [256 * group, 256 * (group + num_groups)) of a tensor. In single
  // precision the lines of `wanted` are asked for meanwhile, spread over the computation: a burst
  // would fill the miss buffers and hold the arithmetic up.
  void (*noise_single)(const math::NoiseStream& stream, std::uint32_t tensor, std::int64_t group,
                       std::int64_t num_groups, math::Mechanism mechanism, const Prefetch& wanted,
                       float* out);
  void (*noise_double)(const math::NoiseStream& stream, std::uint32_t tensor, std::int64_t group,
                       std::int64_t num_groups, math::Mechanism mechanism, const Prefetch& wanted,
                       double* out);

  // Anchor channels of a task, at most; they are taken in whole vectors of `conv_lanes`.
  std::int64_t conv_channels, conv_lanes;
  // Writes the task's part of conv.out; every element of conv.out belongs to one task. Returns the
  // sum of the part's squares where these are wanted.
  double (*conv_grad)(const ConvGrad& conv, const ConvTask& task, const ConvWorkspace& workspace);
  // One sample's squared norm, raised by the bound on its rounding errors.
  double (*ghost_norm)(const GhostNorm& ghost, std::int64_t sample);

  // PReLU's backward pass over one row: grad_x = grad where x > 0, else slope * grad. Returns the
  // sum of x * grad over the other x, float64 between pieces of 4,096.
  double (*prelu_grad)(const float* x, const float* grad, float slope, std::int64_t length,
                       float* grad_x);

  MorphologyPasses morphology[kItemKinds];

  // Reads everything once: the machine's read bandwidth, for the benchmarks.
  std::uint64_t (*read_all)(const void* data, std::int64_t bytes);

  // Multiply-adds of float32 vectors in independent chains, and how many operations they were: the
  // machine's arithmetic, for the benchmarks. Returns a sum, without which they could be left out.
  float (*multiply_add)(std::int64_t rounds, std::int64_t* operations);
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
