// What one clip_and_noise call is told: raw pointers, sizes and settings, for CPU and CUDA alike.
//
//   norm[g][u]  = || sum (or mean) over the rows of unit u of group g's gradients ||
//   weight      = clipping_weight(norm, bound)          bound = C (1 - margin)
//   x[u][j]     = sum over the rows b of unit u of grad[b][j]
//   out[j]      = (accumulate ? out[j] : 0) + sum_u weight[u] * x[u][j] + scale * noise[j]
//   out[j]      = out[j] / divisor
#pragma once

#include <cstdint>

#include "math/clipping.h"
#include "math/noise.h"

namespace dpfast {

enum class DType : int { kFloat64 = 0, kFloat32 = 1, kBFloat16 = 2, kFloat16 = 3 };
enum class Norm : int { kL2 = 0, kL1 = 1 };
enum class Until : int { kEnd = 0, kNorms = 1, kWeights = 2 };

inline std::int64_t item_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// One parameter: [B, P] with contiguous columns; float64 output for float64 input, else float32.
struct Tensor {
  const void* grad;         // [B, P], rows row_stride elements apart
  void* out;                // [P]
  std::int64_t row_stride;  // elements, may be 0 (broadcast rows)
  std::int64_t numel;       // P
  DType dtype;
  int group;  // index of its norm and threshold
  // `out` already holds the clipped sum, what is to be accumulated included, and grad is out: only
  // noise and division are left. Needs given norms.
  bool summed;
};

// Columns are cut into chunks of this many; a chunk lies within one tensor.
constexpr std::int64_t kChunk = 4096;

// Offsets into the int64 noise state: 4 words of key, then the number of steps taken.
constexpr int kNoiseStateKey = 0;
constexpr int kNoiseStateStep = 4;
constexpr int kNoiseStateWords = 5;

struct ClipAndNoise {
  const Tensor* tensors;
  std::int64_t num_tensors;
  std::int64_t num_rows;   // B
  std::int64_t num_units;  // U slots; B where every row is its own unit
  int num_groups;          // 1, or num_tensors

  // Rows by unit, all null where every row is its own unit. A unit's rows are always added before
  // they are weighted, in this order: rows that cancel may be far larger than their sum, and
  // added one by one to the other units' they would round these away.
  const std::int64_t* row_order;   // [B] rows sorted by unit
  const std::int64_t* unit_start;  // [U + 1] into row_order; empty slots have equal ends
  const std::int64_t* unit_count;  // [1] number of units that occur
  bool average_rows;               // mean over a unit's rows, not sum

  math::Clipping clipping;
  double stability;
  Norm norm;
  double percentile;             // threshold from this batch's norms; negative: not asked
  const double* bounds;          // [G] on the host, or null
  const double* device_bounds;   // [G] where the kernels run, or null
  const double* given_norms;     // [G, U] or null
  double margin;                 // slack for the norm's rounding
  const double* custom_weights;  // [U] or null
  math::Mechanism mechanism;
  double noise_multiplier;
  const double* group_noise_weights;  // [G] on the host, or null for 1
  bool proportional_noise;            // group noise weights are the bounds themselves
  std::int64_t* noise_state;          // [kNoiseStateWords] where the kernels run, or null
  double divisor;
  bool accumulate;

  // Results beside out.
  double* threshold;        // [G]
  double* norms;            // [G, U]; NaN in empty slots
  std::int64_t* nonfinite;  // [1] units dropped

  void* workspace;  // of workspace_bytes(...)

  // Where a call ends that does only the first steps; it writes no output.
  Until until;
  double* weights;  // [G, U], of the sum of a unit's rows; null unless it ends there
};

inline std::int64_t count_chunks(std::int64_t numel) { return (numel + kChunk - 1) / kChunk; }

inline bool pays_by_l1(const ClipAndNoise& call) {
  return call.mechanism == math::Mechanism::kLaplace && call.norm == Norm::kL1;
}

}  // namespace dpfast
