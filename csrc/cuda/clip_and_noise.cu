// clip_and_noise on CUDA: four kernels on one stream, however many tensors there are.
//
// Floor: B * P read twice (once with given norms), P written, at the device's copy bandwidth.
#include <algorithm>
#include <vector>

#include "cuda/clip_and_noise_cuda.h"
#include "cuda/launch.cuh"
#include "cuda/weighted_sum.cuh"

namespace dpfast::cuda {
namespace {

constexpr int kBlocksPerProcessor = 16;  // grid-stride loops take the rest
constexpr int kStoreThreads = 128;
constexpr int kValuesPerLaunch = 400;  // doubles in kernel parameters, below 4 KB

struct Values {
  double values[kValuesPerLaunch];
  int count;
};

__global__ void store_values_kernel(const __grid_constant__ Values values, double* out) {
  for (int i = threadIdx.x; i < values.count; i += kStoreThreads) out[i] = values.values[i];
}

struct Workspace {
  double* parts;          // [U, chunks]
  double* weights;        // [G, U]
  double* scales;         // [G]
  double* bounds;         // [G]
  double* noise_weights;  // [G]
  Release* release;

  Workspace(const ClipAndNoise& call, std::int64_t num_chunks) {
    double* next = static_cast<double*>(call.workspace);
    const auto take = [&](std::int64_t count) {
      double* mine = next;
      next += count;
      return mine;
    };
    parts = take(num_chunks * call.num_units);
    weights = take(call.num_groups * call.num_units);
    scales = take(call.num_groups);
    bounds = take(call.num_groups);
    noise_weights = take(call.num_groups);
    release = reinterpret_cast<Release*>(next);
  }
};

class Launcher {
 public:
  Launcher(const ClipAndNoise& call, int device, cudaStream_t stream)
      : call_(call), stream_(stream) {
    check(cudaDeviceGetAttribute(&processors_, cudaDevAttrMultiProcessorCount, device),
          "cudaDeviceGetAttribute");
    first_chunk_.push_back(0);
    for (std::int64_t k = 0; k < call.num_tensors; ++k) {
      first_chunk_.push_back(first_chunk_.back() + count_chunks(call.tensors[k].numel));
    }
  }

  void run() {
    const Workspace workspace(call_, first_chunk_.back());
    if (call_.given_norms == nullptr) norms(workspace);
    if (call_.until == Until::kNorms) return;
    weights(workspace);
    if (call_.until == Until::kWeights) return;
    sums(workspace);
  }

 private:
  int grid(std::int64_t blocks) const {
    return static_cast<int>(std::max<std::int64_t>(
        1, std::min<std::int64_t>(blocks, std::int64_t{kBlocksPerProcessor} * processors_)));
  }

  // Calls launch(batch) for the tensors of one dtype, in as few batches as parameters allow.
  template <class Launch>
  void for_each_batch(DType dtype, std::int64_t tile_columns, const Launch& launch) const {
    TensorBatch batch;
    batch.count = 0;
    batch.num_tiles = 0;
    for (std::int64_t k = 0; k < call_.num_tensors; ++k) {
      const Tensor& tensor = call_.tensors[k];
      if (tensor.dtype != dtype) continue;
      batch.slices[batch.count++] = {
          tensor.grad,     tensor.out,      tensor.row_stride, tensor.numel,
          first_chunk_[k], batch.num_tiles, tensor.group,      static_cast<std::uint32_t>(k),
          tensor.summed};
      batch.num_tiles += (tensor.numel + tile_columns - 1) / tile_columns;
      if (batch.count == kTensorsPerLaunch) {
        launch(batch);
        batch.count = 0;
        batch.num_tiles = 0;
      }
    }
    if (batch.count > 0) launch(batch);
  }

  template <class Launch>
  void for_each_dtype(const Launch& launch) const {
    launch(DType::kFloat64, double{});
    launch(DType::kFloat32, float{});
    launch(DType::kBFloat16, __nv_bfloat16{});
    launch(DType::kFloat16, __half{});
  }

  void norms(const Workspace& workspace) const {
    if (call_.num_units == 0) return;
    const NormTask task{call_.num_units,  first_chunk_.back(), call_.row_order,
                        call_.unit_start, call_.norm,          workspace.parts};
    const TotalTask total{workspace.parts,  call_.num_units,    first_chunk_.back(),
                          call_.unit_start, call_.average_rows, call_.norm,
                          call_.norms};
    constexpr int kWarps = kNormThreads / kWarp;
    for_each_dtype([&](DType dtype, auto sample) {
      for_each_batch(dtype, kChunk, [&](const TensorBatch& batch) {
        const std::int64_t tasks = batch.num_tiles * call_.num_units;
        launch("part_norms_kernel", part_norms_kernel<decltype(sample)>,
               grid((tasks + kWarps - 1) / kWarps), kNormThreads, stream_, batch, task);
      });
    });
    if (call_.num_groups == 1) {
      launch("total_norms_kernel", total_norms_kernel, grid(call_.num_units), kTotalThreads,
             stream_, total);
      return;
    }
    for_each_dtype([&](DType dtype, auto) {
      for_each_batch(dtype, kChunk, [&](const TensorBatch& batch) {
        const std::int64_t tasks = batch.count * call_.num_units;
        launch("group_norms_kernel", group_norms_kernel, grid((tasks + kWarps - 1) / kWarps),
               kNormThreads, stream_, batch, total);
      });
    });
  }

  // Host values travel in kernel parameters: no copy whose source would have to stay alive.
  const double* store(const double* values, double* out) const {
    for (int first = 0; first < call_.num_groups; first += kValuesPerLaunch) {
      Values batch;
      batch.count = std::min(kValuesPerLaunch, call_.num_groups - first);
      std::copy(values + first, values + first + batch.count, batch.values);
      launch("store_values_kernel", store_values_kernel, 1, kStoreThreads, stream_, batch,
             out + first);
    }
    return out;
  }

  bool noisy() const {
    return call_.mechanism != math::Mechanism::kNone && call_.noise_multiplier != 0.0;
  }

  void weights(const Workspace& workspace) const {
    WeightTask task{};
    task.num_units = call_.num_units;
    task.num_groups = call_.num_groups;
    task.unit_start = call_.unit_start;
    task.unit_count = call_.unit_count;
    task.average_rows = call_.average_rows;
    task.clipping = call_.clipping;
    task.stability = call_.stability;
    task.percentile = call_.percentile;
    task.bounds = call_.device_bounds;
    if (task.bounds == nullptr && call_.bounds != nullptr) {
      if (call_.num_groups == 1) {
        task.single_bound = call_.bounds[0];
      } else {
        task.bounds = store(call_.bounds, workspace.bounds);
      }
    }
    task.norms_in = call_.given_norms == nullptr ? call_.norms : call_.given_norms;
    task.margin = call_.margin;
    task.custom_weights = call_.custom_weights;
    task.noise_multiplier = noisy() ? call_.noise_multiplier : 0.0;
    if (call_.group_noise_weights != nullptr && call_.num_groups > 1) {
      task.noise_weights = store(call_.group_noise_weights, workspace.noise_weights);
    }
    task.proportional_noise = call_.proportional_noise;
    task.noise_l1 = pays_by_l1(call_);
    task.noise_state = call_.noise_state;
    task.divisor = call_.divisor;
    task.threshold = call_.threshold;
    task.norms = call_.norms;
    task.nonfinite = call_.nonfinite;
    task.weights = call_.until == Until::kWeights ? call_.weights : workspace.weights;
    task.scales = workspace.scales;
    task.release = workspace.release;
    launch("weights_kernel", weights_kernel, 1, kWeightThreads, stream_, task);
  }

  void sums(const Workspace& workspace) const {
    const SumTask task{call_.num_units,
                       call_.row_order,
                       call_.unit_start,
                       workspace.weights,
                       workspace.scales,
                       workspace.release,
                       noisy() ? call_.mechanism : math::Mechanism::kNone,
                       call_.accumulate};
    for_each_dtype([&](DType dtype, auto sample) {
      using T = decltype(sample);
      const auto kernel = call_.unit_start == nullptr ? weighted_sum_kernel<T, false>
                                                      : weighted_sum_kernel<T, true>;
      for_each_batch(dtype, kTile, [&](const TensorBatch& batch) {
        launch("weighted_sum_kernel", kernel, grid(batch.num_tiles), kSumThreads, stream_, batch,
               task);
      });
    });
  }

  const ClipAndNoise& call_;
  cudaStream_t stream_;
  int processors_ = 1;
  std::vector<std::int64_t> first_chunk_;  // [tensors + 1]
};

}  // namespace

std::int64_t workspace_bytes(std::int64_t num_chunks, std::int64_t num_units, int num_groups) {
  return static_cast<std::int64_t>(sizeof(double)) *
             ((num_chunks + num_groups) * num_units + 3 * std::int64_t{num_groups}) +
         static_cast<std::int64_t>(sizeof(Release));
}

void clip_and_noise(const ClipAndNoise& call, int device, void* stream) {
  const DeviceGuard guard(device);
  Launcher(call, device, static_cast<cudaStream_t>(stream)).run();
}

}  // namespace dpfast::cuda
