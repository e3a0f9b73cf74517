// clip_and_noise on the CPU: norms, weights, weighted sum with noise.
//
// Floor: B * P read twice (once with given norms), P written. The norm pass walks the column
// chunks upwards and the sum pass downwards, so that what the first read last is still in cache.
// Each partial result has its own place and is added in a fixed order: the bits do not depend on
// the number of threads.
#include "cpu/clip_and_noise_cpu.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/noise_stream.h"
#include "cpu/thread_pool.h"

namespace dpfast::cpu {
namespace {

constexpr std::int64_t kParallelBytes = 1 << 18;  // below this a second thread costs more
constexpr std::int64_t kTaskBytes = 1 << 18;      // what a task should read
constexpr std::int64_t kCacheBytes = 32 << 20;    // more than this leaves nothing in a cache
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// Memory is read at full speed only in long runs: 16 chunks of a row (256 KB of float32) in the
// norm pass, and 8 rows side by side over up to 32,768 columns in the sum pass, whose sums
// (256 KB) stay in L2.
constexpr std::int64_t kSpanChunks = 16;
constexpr std::int64_t kMaxSpan = 32768;
constexpr std::int64_t kRowSlab = 256;        // row pointers gathered at once
constexpr std::int64_t kBriefRun = 32 << 10;  // bytes; prefetchers have hardly begun when it ends
constexpr std::int64_t kNoiseBlock = 2048;    // columns of noise made while 8 rows of them arrive

// Columns [start, start + length) of one tensor.
struct Run {
  std::int32_t tensor;
  std::int64_t start;
  std::int64_t length;
};

struct Workspace {
  double* parts;    // [chunks, U]
  double* weights;  // [G, U], of the sum of a unit's rows

  Workspace(const ClipAndNoise& call, std::int64_t num_chunks)
      : parts(static_cast<double*>(call.workspace)), weights(parts + num_chunks * call.num_units) {}
};

const char* cell(const Tensor& tensor, std::int64_t row, std::int64_t column) {
  return static_cast<const char*>(tensor.grad) +
         (row * tensor.row_stride + column) * item_size(tensor.dtype);
}

std::vector<Run> cut(const ClipAndNoise& call, std::int64_t span) {
  std::vector<Run> runs;
  for (std::int64_t k = 0; k < call.num_tensors; ++k) {
    for (std::int64_t start = 0; start < call.tensors[k].numel; start += span) {
      runs.push_back(
          {static_cast<std::int32_t>(k), start, std::min(span, call.tensors[k].numel - start)});
    }
  }
  return runs;
}

// Runs task(i) over [0, count) in runs long enough to be worth handing out.
template <class Task>
void for_each(std::int64_t count, std::int64_t bytes, int num_threads, const Task& task) {
  if (bytes < kParallelBytes) num_threads = 1;
  const std::int64_t per_task =
      std::max<std::int64_t>(1, std::min(count / (4 * static_cast<std::int64_t>(num_threads)),
                                         count * kTaskBytes / std::max<std::int64_t>(bytes, 1)));
  parallel_for((count + per_task - 1) / per_task, num_threads, [&](std::int64_t run) {
    const std::int64_t end = std::min(count, (run + 1) * per_task);
    for (std::int64_t i = run * per_task; i < end; ++i) task(i);
  });
}

// --- pass 1: parts[chunk, unit] ---

// Chunks [first, last) of a tensor's span, of which a unit's part is taken at a time.
struct Span {
  std::int64_t first;
  std::int64_t last;
};

// Spans end where their tensor does: the rows of a small tensor follow one another in memory, and
// unit after unit is then read in one run.
std::vector<Span> group_chunks(const std::vector<Run>& chunks) {
  std::vector<Span> spans;
  for (std::int64_t c = 0; c < static_cast<std::int64_t>(chunks.size()); ++c) {
    if (spans.empty() || spans.back().last - spans.back().first == kSpanChunks ||
        chunks[c].start == 0) {
      spans.push_back({c, c});
    }
    ++spans.back().last;
  }
  return spans;
}

void norm_task(const ClipAndNoise& call, const Run* chunks, std::int64_t num_chunks,
               std::int64_t unit, double* parts) {
  const Kernels& isa = kernels();
  const Tensor& tensor = call.tensors[chunks[0].tensor];
  if (call.unit_start == nullptr) {
    for (std::int64_t c = 0; c < num_chunks; ++c) {
      const void* row = cell(tensor, unit, chunks[c].start);
      parts[c * call.num_units + unit] =
          isa.norm_part(&row, 1, chunks[c].length, tensor.dtype, call.norm);
    }
    return;
  }
  const std::int64_t* order = call.row_order + call.unit_start[unit];
  const std::int64_t num_rows = call.unit_start[unit + 1] - call.unit_start[unit];
  std::vector<const void*> rows(static_cast<std::size_t>(num_rows));
  for (std::int64_t c = 0; c < num_chunks; ++c) {
    for (std::int64_t r = 0; r < num_rows; ++r) rows[r] = cell(tensor, order[r], chunks[c].start);
    parts[c * call.num_units + unit] =
        isa.norm_part(rows.data(), num_rows, chunks[c].length, tensor.dtype, call.norm);
  }
}

std::int64_t rows_of_unit(const ClipAndNoise& call, std::int64_t u) {
  return call.unit_start == nullptr ? 1 : call.unit_start[u + 1] - call.unit_start[u];
}

void take_norms(const ClipAndNoise& call, const std::vector<Run>& chunks,
                const Workspace& workspace, std::int64_t bytes, int num_threads) {
  const std::int64_t num_chunks = static_cast<std::int64_t>(chunks.size());
  const std::vector<Span> spans = group_chunks(chunks);
  const std::int64_t tasks = static_cast<std::int64_t>(spans.size()) * call.num_units;
  for_each(tasks, bytes, num_threads, [&](std::int64_t i) {
    const Span& span = spans[i / call.num_units];
    norm_task(call, chunks.data() + span.first, span.last - span.first, i % call.num_units,
              workspace.parts + span.first * call.num_units);
  });
  std::fill(call.norms, call.norms + call.num_groups * call.num_units, 0.0);
  for (std::int64_t c = 0; c < num_chunks; ++c) {
    double* norms = call.norms + call.tensors[chunks[c].tensor].group * call.num_units;
    const double* parts = workspace.parts + c * call.num_units;
    for (std::int64_t u = 0; u < call.num_units; ++u) norms[u] += parts[u];
  }
  for (int g = 0; g < call.num_groups; ++g) {
    for (std::int64_t u = 0; u < call.num_units; ++u) {
      double& norm = call.norms[g * call.num_units + u];
      const std::int64_t rows = rows_of_unit(call, u);
      if (call.norm == Norm::kL2) norm = std::sqrt(norm);
      if (call.average_rows) norm /= static_cast<double>(rows);
      if (rows == 0) norm = kNaN;
    }
  }
}

// --- pass 2: thresholds and weights ---

double percentile_of(const ClipAndNoise& call) {
  std::vector<double> finite;
  for (std::int64_t u = 0; u < call.num_units; ++u) {
    if (std::isfinite(call.norms[u])) finite.push_back(call.norms[u]);
  }
  if (finite.empty()) return kNaN;
  const math::Rank rank =
      math::percentile_rank(call.percentile, static_cast<std::int64_t>(finite.size()));
  std::nth_element(finite.begin(), finite.begin() + rank.lower, finite.end());
  const double low = finite[rank.lower];
  if (rank.blend == 0.0) return low;
  const double high = *std::min_element(finite.begin() + rank.lower + 1, finite.end());
  return low + rank.blend * (high - low);
}

// Returns false where a bound that came from memory is unusable.
bool take_thresholds(const ClipAndNoise& call) {
  if (call.percentile >= 0.0) {
    call.threshold[0] = percentile_of(call);
    return true;
  }
  const double* source = call.device_bounds != nullptr ? call.device_bounds : call.bounds;
  for (int g = 0; g < call.num_groups; ++g) {
    call.threshold[g] = source[g];
    if (!usable_bound(source[g])) return false;
  }
  return true;
}

void take_weights(const ClipAndNoise& call, const Workspace& workspace) {
  const std::int64_t units = call.num_units;
  *call.nonfinite = 0;
  for (std::int64_t u = 0; u < units; ++u) {
    const std::int64_t rows = rows_of_unit(call, u);
    bool dropped = false;  // from all groups, as soon as one of them is not finite
    for (int g = 0; g < call.num_groups; ++g) {
      dropped |= !std::isfinite(call.norms[g * units + u]);
    }
    *call.nonfinite += dropped && rows > 0;
    const double custom = call.custom_weights != nullptr ? call.custom_weights[u] : 0.0;
    const double averaged_rows = call.average_rows ? static_cast<double>(rows) : 1.0;
    for (int g = 0; g < call.num_groups; ++g) {
      const double bound = call.threshold[g] * (1.0 - call.margin);
      const double weight = math::clipping_weight(call.clipping, call.norms[g * units + u], bound,
                                                  call.stability, custom, averaged_rows);
      workspace.weights[g * units + u] = dropped ? 0.0 : weight;
    }
  }
}

// --- pass 3: weighted sum and noise ---

struct Release {
  math::NoiseStream stream;
  std::vector<double> scales;  // [G], empty without noise
  double factor;               // 1 / divisor, NaN where no threshold could be taken
  bool around_caches;          // write so: no line of out is in one
};

double group_weight(const ClipAndNoise& call, int g) {
  if (call.proportional_noise) return call.threshold[g];
  return call.group_noise_weights == nullptr ? 1.0 : call.group_noise_weights[g];
}

Release prepare_release(const ClipAndNoise& call, std::int64_t bytes) {
  Release release{};
  release.around_caches = !call.accumulate && bytes > kCacheBytes;
  release.factor = std::isfinite(call.threshold[0]) ? 1.0 / call.divisor : kNaN;
  if (call.mechanism == math::Mechanism::kNone || call.noise_multiplier == 0.0) return release;
  const bool l1 = pays_by_l1(call);
  double total = 0.0;
  for (int g = 0; g < call.num_groups; ++g) {
    total = math::add_group(total, call.threshold[g], group_weight(call, g), l1);
  }
  for (int g = 0; g < call.num_groups; ++g) {
    release.scales.push_back(call.num_groups == 1 ? call.noise_multiplier * call.threshold[0]
                                                  : math::noise_scale(total, group_weight(call, g),
                                                                      call.noise_multiplier, l1));
  }
  release.stream = take_stream(call.noise_state);
  return release;
}

// The two output precisions, as the kernels name them.
struct Single {
  using Out = float;
  static constexpr auto kNoise = &Kernels::noise_single;
  static constexpr auto kStart = &Kernels::start_single;
  static constexpr auto kFinish = &Kernels::finish_single;
};

struct Double {
  using Out = double;
  static constexpr auto kNoise = &Kernels::noise_double;
  static constexpr auto kStart = &Kernels::start_double;
  static constexpr auto kFinish = &Kernels::finish_double;
};

// The rows that sum_task adds next. Dropped units have weight 0 and may hold NaN: they are never
// multiplied.
class RowGatherer {
 public:
  RowGatherer(const ClipAndNoise& call, const double* weights, const Run& run)
      : call_(call), tensor_(call.tensors[run.tensor]), weights_(weights), start_(run.start) {}

  // Up to `wanted` rows of units that have one row, with their weights; 0 when none are left.
  std::int64_t singles(std::int64_t wanted, const void** rows, double* weights) {
    std::int64_t gathered = 0;
    if (tensor_.summed) {
      if (single_++ > 0) return 0;
      rows[0] = cell(tensor_, 0, start_);
      weights[0] = 1.0;
      return 1;
    }
    for (; single_ < call_.num_units && gathered < wanted; ++single_) {
      const double weight = weights_[single_];
      if (weight == 0.0 || rows_of_unit(call_, single_) != 1) continue;
      rows[gathered] = cell(tensor_, row(single_, 0), start_);
      weights[gathered++] = tensor_.dtype == DType::kFloat64 ? weight : math::short_weight(weight);
    }
    return gathered;
  }

  // The rows of the next unit that has several; false when none is left.
  bool several(std::vector<const void*>& rows, double* weight) {
    if (tensor_.summed || call_.unit_start == nullptr) return false;
    for (; several_ < call_.num_units; ++several_) {
      const std::int64_t count = rows_of_unit(call_, several_);
      if (weights_[several_] == 0.0 || count < 2) continue;
      rows.clear();
      for (std::int64_t r = 0; r < count; ++r) {
        rows.push_back(cell(tensor_, row(several_, r), start_));
      }
      *weight = weights_[several_++];
      return true;
    }
    return false;
  }

 private:
  std::int64_t row(std::int64_t unit, std::int64_t r) const {
    return call_.unit_start == nullptr ? unit : call_.row_order[call_.unit_start[unit] + r];
  }

  const ClipAndNoise& call_;
  const Tensor& tensor_;
  const double* weights_;  // [U] of this tensor's group
  std::int64_t start_;
  std::int64_t single_ = 0, several_ = 0;  // next units to look at
};

// Sums, noise and output of one run. The noise of a block is computed while the first rows of its
// columns are on their way from memory: arithmetic and memory work at the same time.
template <class Precision>
void sum_task(const ClipAndNoise& call, const double* all_weights, const Release& release,
              const Run& run) {
  using Out = typename Precision::Out;
  const Kernels& isa = kernels();
  const Tensor& tensor = call.tensors[run.tensor];
  const bool noisy = !release.scales.empty();
  Out* out = static_cast<Out*>(tensor.out) + run.start;
  thread_local std::vector<double> buffer(kMaxSpan);
  double* sums = buffer.data();

  RowGatherer gatherer(call, all_weights + tensor.group * call.num_units, run);
  const void* rows[kRowSlab];
  double weights[kRowSlab];
  std::int64_t gathered = gatherer.singles(kRowSlab, rows, weights);
  const std::int64_t first_rows = std::min(kRowsPerPass, gathered);
  const bool brief = run.length * item_size(tensor.dtype) <= kBriefRun;
  std::vector<const void*> unit;
  double unit_weight;
  bool has_unit = gatherer.several(unit, &unit_weight);
  const auto add_unit = [&](std::int64_t first, std::int64_t count) {
    isa.add_unit(unit.data(), static_cast<std::int64_t>(unit.size()), unit_weight, first, count,
                 tensor.dtype, sums + first);
  };
  // Noise needs rows to come beside it: the first units' single ones, else those of the first unit.
  const bool unit_first = gathered == 0 && has_unit;
  const void* const* beside = unit_first ? unit.data() : rows;
  const std::int64_t num_beside =
      unit_first ? std::min<std::int64_t>(kRowsPerPass, unit.size()) : first_rows;
  alignas(64) Out noise[kNoiseBlock];
  for (std::int64_t first = 0; first < run.length; first += kNoiseBlock) {
    const std::int64_t count = std::min(kNoiseBlock, run.length - first);
    if (noisy) {
      const Prefetch wanted{beside, num_beside, first * item_size(tensor.dtype),
                            (first + count) * item_size(tensor.dtype)};
      (isa.*Precision::kNoise)(release.stream, static_cast<std::uint32_t>(run.tensor),
                               (run.start + first) / math::kNoiseGroup,
                               (count + math::kNoiseGroup - 1) / math::kNoiseGroup, call.mechanism,
                               wanted, noise);
    }
    (isa.*Precision::kStart)(noisy ? noise : nullptr, noisy ? release.scales[tensor.group] : 0.0,
                             call.accumulate && !tensor.summed ? out + first : nullptr, count,
                             sums + first);
    isa.weighted_sum(rows, weights, first_rows, brief ? gathered : 0, first, count, tensor.dtype,
                     sums + first);
    if (unit_first) add_unit(first, count);
  }
  for (std::int64_t done = first_rows; gathered > 0; done = 0) {
    isa.weighted_sum(rows + done, weights + done, gathered - done, brief ? gathered - done : 0, 0,
                     run.length, tensor.dtype, sums);
    gathered = gatherer.singles(kRowSlab, rows, weights);
  }
  if (unit_first) has_unit = gatherer.several(unit, &unit_weight);
  for (; has_unit; has_unit = gatherer.several(unit, &unit_weight)) add_unit(0, run.length);
  (isa.*Precision::kFinish)(sums, release.factor, run.length, release.around_caches, out);
}

// Runs as long as possible that still give every thread several; the bits do not depend on it.
std::int64_t choose_span(const ClipAndNoise& call, int num_threads) {
  std::int64_t columns = 0;
  for (std::int64_t k = 0; k < call.num_tensors; ++k) columns += call.tensors[k].numel;
  std::int64_t span = kMaxSpan;
  while (span > math::kNoiseGroup && columns / span < 4 * num_threads) span /= 2;
  return span;
}

void take_sums(const ClipAndNoise& call, const Workspace& workspace, const Release& release,
               std::int64_t bytes, int num_threads) {
  const std::vector<Run> runs = cut(call, choose_span(call, num_threads));
  const std::int64_t num_runs = static_cast<std::int64_t>(runs.size());
  for_each(num_runs, bytes, num_threads, [&](std::int64_t i) {
    const Run& run = runs[num_runs - 1 - i];
    if (call.tensors[run.tensor].dtype == DType::kFloat64) {
      sum_task<Double>(call, workspace.weights, release, run);
    } else {
      sum_task<Single>(call, workspace.weights, release, run);
    }
  });
}

}  // namespace

bool usable_bound(double bound) { return bound > 0.0 && std::isfinite(bound); }

std::int64_t workspace_bytes(std::int64_t num_chunks, std::int64_t num_units, int num_groups) {
  return static_cast<std::int64_t>(sizeof(double)) * (num_chunks + num_groups) * num_units;
}

Status clip_and_noise(const ClipAndNoise& call, int num_threads) {
  if (call.unit_count != nullptr && *call.unit_count > call.num_units) {
    return Status::kTooManyUnits;
  }
  const std::vector<Run> chunks = cut(call, kChunk);
  const Workspace workspace(call, static_cast<std::int64_t>(chunks.size()));
  std::int64_t bytes = 0, columns = 0;
  for (std::int64_t k = 0; k < call.num_tensors; ++k) {
    const std::int64_t rows = call.tensors[k].summed ? 1 : call.num_rows;
    bytes += call.tensors[k].numel * rows * item_size(call.tensors[k].dtype);
    columns += call.tensors[k].numel;
  }
  if (call.given_norms == nullptr) {
    take_norms(call, chunks, workspace, bytes, num_threads);
  } else {
    std::copy(call.given_norms, call.given_norms + call.num_groups * call.num_units, call.norms);
  }
  if (call.until == Until::kNorms) return Status::kOk;
  if (!take_thresholds(call)) return Status::kBadBound;
  take_weights(call, workspace);
  if (call.until == Until::kWeights) {
    std::copy(workspace.weights, workspace.weights + call.num_groups * call.num_units,
              call.weights);
    return Status::kOk;
  }
  // A column of noise costs about as much as reading 32 bytes.
  take_sums(call, workspace, prepare_release(call, bytes), bytes + 32 * columns, num_threads);
  return Status::kOk;
}

void fill_noise(const math::NoiseStream& stream, std::uint32_t tensor, math::Mechanism mechanism,
                std::int64_t count, float* single, double* dual, int num_threads) {
  const std::int64_t blocks = (count + kNoiseBlock - 1) / kNoiseBlock;
  for_each(blocks, count * 8, num_threads, [&](std::int64_t block) {
    const std::int64_t first = block * kNoiseBlock;
    const std::int64_t wanted = std::min(kNoiseBlock, count - first);
    const std::int64_t group = first / math::kNoiseGroup;
    const std::int64_t groups = (wanted + math::kNoiseGroup - 1) / math::kNoiseGroup;
    if (single != nullptr) {
      float noise[kNoiseBlock];
      kernels().noise_single(stream, tensor, group, groups, mechanism, Prefetch{}, noise);
      std::copy(noise, noise + wanted, single + first);
    } else {
      double noise[kNoiseBlock];
      kernels().noise_double(stream, tensor, group, groups, mechanism, Prefetch{}, noise);
      std::copy(noise, noise + wanted, dual + first);
    }
  });
}

}  // namespace dpfast::cpu
