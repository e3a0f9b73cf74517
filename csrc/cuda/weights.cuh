// Pass 2: thresholds, weights, noise scales and the step number, by one block.
#pragma once

#include "cuda/norms.cuh"

namespace dpfast::cuda {

constexpr int kWeightThreads = 1024;

// What pass 3 needs, in the workspace.
struct Release {
  math::NoiseStream stream;
  double factor;  // 1 / divisor; NaN where a bound is unusable: nothing is released
};

struct WeightTask {
  std::int64_t num_units;
  int num_groups;
  const std::int64_t* unit_start;
  const std::int64_t* unit_count;
  bool average_rows;
  math::Clipping clipping;
  double stability;
  double percentile;
  double single_bound;     // where bounds is null
  const double* bounds;    // [G]
  const double* norms_in;  // [G, U], may be norms
  double margin;
  const double* custom_weights;  // [U] or null
  double noise_multiplier;       // 0: no noise
  const double* noise_weights;   // [G] or null for 1
  bool proportional_noise;
  bool noise_l1;
  std::int64_t* noise_state;
  double divisor;
  double* threshold;  // [G]
  double* norms;      // [G, U]
  std::int64_t* nonfinite;
  double* weights;  // [G, U], of the sum of a unit's rows
  double* scales;   // [G]
  Release* release;
};

__device__ inline bool is_finite(double x) { return fabs(x) <= 1.7976931348623157e308; }

__device__ inline std::int64_t block_count(bool mine, int* shared) {
  // Integer additions: the order of the atomics does not matter.
  if (threadIdx.x == 0) *shared = 0;
  __syncthreads();
  if (mine) atomicAdd(shared, 1);
  __syncthreads();
  const int total = *shared;
  __syncthreads();
  return total;
}

// The k-th smallest finite norm, by bytes from the most significant: norms are >= 0, so that
// their bits are ordered as they are. Integer atomics only.
__device__ inline double select_norm(const double* norms, std::int64_t count, std::int64_t k,
                                     int* histogram) {
  unsigned long long prefix = 0;
  for (int shift = 56; shift >= 0; shift -= 8) {
    for (int d = threadIdx.x; d < 256; d += kWeightThreads) histogram[d] = 0;
    __syncthreads();
    for (std::int64_t u = threadIdx.x; u < count; u += kWeightThreads) {
      if (!is_finite(norms[u])) continue;
      const unsigned long long bits = __double_as_longlong(norms[u]);
      // At shift 56 nothing has been decided yet, and a shift by 64 is undefined.
      if (shift == 56 || (bits >> (shift + 8)) == (prefix >> (shift + 8))) {
        atomicAdd(&histogram[(bits >> shift) & 255], 1);
      }
    }
    __syncthreads();
    // Every thread walks the same 256 counts to the same digit.
    int digit = 0;
    while (digit < 255 && k >= histogram[digit]) k -= histogram[digit++];
    prefix |= static_cast<unsigned long long>(digit) << shift;
    __syncthreads();
  }
  return __longlong_as_double(prefix);
}

__device__ inline double percentile_of(const WeightTask& task, int* shared) {
  std::int64_t finite = 0;
  for (std::int64_t first = 0; first < task.num_units; first += kWeightThreads) {
    const std::int64_t u = first + threadIdx.x;
    finite += block_count(u < task.num_units && is_finite(task.norms_in[u]), shared);
  }
  if (finite == 0) return nan("");
  const math::Rank rank = math::percentile_rank(task.percentile, finite);
  const double low = select_norm(task.norms_in, task.num_units, rank.lower, shared);
  if (rank.blend == 0.0) return low;
  const double high = select_norm(task.norms_in, task.num_units, rank.lower + 1, shared);
  return low + rank.blend * (high - low);
}

__device__ inline std::int64_t rows_of_unit(const WeightTask& task, std::int64_t unit) {
  return task.unit_start == nullptr ? 1 : task.unit_start[unit + 1] - task.unit_start[unit];
}

__device__ inline bool is_dropped(const WeightTask& task, std::int64_t unit) {
  for (int g = 0; g < task.num_groups; ++g) {
    if (!is_finite(task.norms_in[g * task.num_units + unit])) return true;
  }
  return false;
}

// gamma of group g, once its threshold is known.
__device__ inline double group_weight(const WeightTask& task, int g) {
  if (task.proportional_noise) return task.threshold[g];
  return task.noise_weights == nullptr ? 1.0 : task.noise_weights[g];
}

// Thresholds, scales, the factor and the stream. Groups are added in order by one thread.
__device__ inline void prepare_release(const WeightTask& task, double percentile_threshold) {
  bool usable = task.unit_count == nullptr || *task.unit_count <= task.num_units;
  double total = 0.0;
  for (int g = 0; g < task.num_groups; ++g) {
    const double bound = task.percentile >= 0.0   ? percentile_threshold
                         : task.bounds == nullptr ? task.single_bound
                                                  : task.bounds[g];
    // A percentile may be 0 (all norms are); a given bound may not.
    usable = usable && is_finite(bound) && (bound > 0.0 || task.percentile >= 0.0);
    task.threshold[g] = bound;
    const double gamma = group_weight(task, g);
    total = math::add_group(total, bound, gamma, task.noise_l1);
  }
  for (int g = 0; g < task.num_groups; ++g) {
    const double bound = task.threshold[g];
    const double gamma = group_weight(task, g);
    task.scales[g] = task.num_groups == 1
                         ? task.noise_multiplier * bound
                         : math::noise_scale(total, gamma, task.noise_multiplier, task.noise_l1);
  }
  task.release->factor = usable ? 1.0 / task.divisor : nan("");
  if (task.noise_multiplier == 0.0) return;
  for (int i = 0; i < math::kChaChaKeyWords; ++i) {
    task.release->stream.key[i] = static_cast<std::uint32_t>(
        static_cast<std::uint64_t>(task.noise_state[kNoiseStateKey + i / 2]) >> (32 * (i % 2)));
  }
  // Atomic, so that two streams sharing a source never share a step.
  task.release->stream.step =
      atomicAdd(reinterpret_cast<unsigned long long*>(task.noise_state + kNoiseStateStep), 1ull);
}

__global__ void __launch_bounds__(kWeightThreads) weights_kernel(const WeightTask task) {
  __shared__ int shared[256];
  const double percentile_threshold = task.percentile >= 0.0 ? percentile_of(task, shared) : 0.0;
  if (threadIdx.x == 0) prepare_release(task, percentile_threshold);
  __syncthreads();

  std::int64_t nonfinite = 0;
  for (std::int64_t first = 0; first < task.num_units; first += kWeightThreads) {
    const std::int64_t u = first + threadIdx.x;
    const bool in_range = u < task.num_units;
    const bool dropped = in_range && is_dropped(task, u);
    nonfinite += block_count(dropped && rows_of_unit(task, u) > 0, shared);
    if (!in_range) continue;
    const double custom = task.custom_weights == nullptr ? 0.0 : task.custom_weights[u];
    const double rows = task.average_rows ? static_cast<double>(rows_of_unit(task, u)) : 1.0;
    for (int g = 0; g < task.num_groups; ++g) {
      const std::int64_t at = g * task.num_units + u;
      const double norm = task.norms_in[at];
      const double weight =
          math::clipping_weight(task.clipping, norm, task.threshold[g] * (1.0 - task.margin),
                                task.stability, custom, rows);
      task.norms[at] = norm;
      task.weights[at] = dropped ? 0.0 : weight;
    }
  }
  if (threadIdx.x == 0) *task.nonfinite = nonfinite;
}

}  // namespace dpfast::cuda
