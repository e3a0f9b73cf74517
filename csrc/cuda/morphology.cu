// Grey-scale morphology on CUDA. Floor: the input read once, the output (and the index) written
// once, at the device's copy bandwidth.
//
// A chain of boxes is one launch where its tiles fit in shared memory (morphology_plan.h says when)
// and a term of a program one launch more. What is between two launches of a chain lies in the
// workspace. Channels with the same program go together.
#include <algorithm>
#include <stdexcept>
#include <vector>

#include "cuda/morphology_cuda.h"
#include "cuda/morphology_plan.h"

namespace dpfast::cuda {
namespace {

constexpr std::int64_t kMostBlocks = std::int64_t{1} << 30;

std::int64_t round_up(std::int64_t bytes) { return (bytes + 15) / 16 * 16; }

struct Device {
  int processors = 1;
  std::int64_t shared_bytes = 0;  // of a block, so that a multiprocessor holds two

  explicit Device(int device) {
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
          "cudaDeviceGetAttribute");
    int most = 0;
    check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
          "cudaDeviceGetAttribute");
    shared_bytes = most / 2 - 1024;
  }
};

// Neighbouring channels with one program: calls take(range, program).
template <class Take>
void for_each_range(const Morphology& call, const Take& take) {
  for (std::int64_t first = 0; first < call.channels;) {
    std::int64_t end = first + 1;
    while (end < call.channels && call.program_of_channel[end] == call.program_of_channel[first]) {
      ++end;
    }
    take(ChannelRange{call.batch, call.channels, first, end - first}, call.program(first));
    first = end;
  }
}

std::int64_t item_bytes(DType dtype, bool keys) {
  if (dtype == DType::kFloat64) return keys ? sizeof(DoubleKey) : sizeof(double);
  return keys ? sizeof(std::int64_t) : sizeof(float);
}

// float16 alone has less range than the sums of several terms, which are rounded once, at the end.
std::int64_t sum_bytes(const Morphology& call) {
  if (call.dtype != DType::kFloat16) return 0;
  for (const MorphologyProgram& program : call.programs) {
    if (program.size() > 1) {
      return round_up(call.batch * call.channels * call.volume() * std::int64_t{sizeof(float)});
    }
  }
  return 0;
}

class Launcher {
 public:
  Launcher(const Morphology& call, const Device& device, void* workspace, cudaStream_t stream)
      : call_(call), source_(math::source_index(call)), device_(device), stream_(stream) {
    if (sum_bytes(call) > 0) sums_ = static_cast<float*>(workspace);
    planes_ = static_cast<char*>(workspace) + sum_bytes(call);
  }

  void run() const {
    for_each_range(call_, [&](const ChannelRange& range, const MorphologyProgram& program) {
      std::int64_t chains = 0;
      for (std::size_t t = 0; t < program.size(); ++t) {
        const bool moves = !program[t].stages.empty();
        const bool follow = moves && call_.index != nullptr;
        Tiling tiling{};
        tiling.channels = range;
        tiling.sign = program[t].sign;
        tiling.add = t > 0;
        tiling.last_term = t + 1 == program.size();
        tiling.sums = sums_;
        if (follow) {
          tiling.index = static_cast<char*>(call_.index) + chains * call_.batch * call_.channels *
                                                               call_.volume() * call_.index_bits /
                                                               8;
        }
        chains += moves ? 1 : 0;
        run_term(program[t], tiling, follow);
      }
    });
  }

  // Of the items between launches.
  std::int64_t plane_bytes() const {
    std::int64_t most = 0;
    for_each_range(call_, [&](const ChannelRange& range, const MorphologyProgram& program) {
      for (const MorphologyTerm& term : program) {
        const bool keys = !term.stages.empty() && call_.index != nullptr;
        const std::vector<PlannedLaunch> launches = plan(range, term, keys);
        const std::int64_t planes = launches.size() < 2 ? 0 : launches.size() < 3 ? 1 : 2;
        most = std::max(most, planes * one_plane(range, keys));
      }
    });
    return most;
  }

 private:
  std::int64_t outputs(const ChannelRange& range) const {
    return range.batch * range.count * call_.volume();
  }

  std::int64_t one_plane(const ChannelRange& range, bool keys) const {
    return round_up(outputs(range) * item_bytes(call_.dtype, keys));
  }

  std::vector<PlannedLaunch> plan(const ChannelRange& range, const MorphologyTerm& term,
                                  bool keys) const {
    Planner planner(call_, outputs(range), item_bytes(call_.dtype, keys), device_.shared_bytes,
                    device_.processors);
    return planner.plan(term);
  }

  void run_term(const MorphologyTerm& term, Tiling tiling, bool keys) const {
    const std::vector<PlannedLaunch> launches = plan(tiling.channels, term, keys);
    char* from = nullptr;  // the input
    char* to = planes_;
    char* other = planes_ + one_plane(tiling.channels, keys);
    for (std::size_t i = 0; i < launches.size(); ++i) {
      const PlannedLaunch& launch = launches[i];
      const bool last = i + 1 == launches.size();
      const void* best_so_far = launch.element && !launch.first ? to : nullptr;
      tiling.input = from == nullptr ? call_.input : nullptr;
      tiling.items_in = from;
      tiling.items_out = last ? nullptr : to;
      tiling.output = call_.output;
      tiling.index_bits = call_.index_bits;
      tiling.source = source_;
      set_tiles(launch, tiling);
      start(launch, tiling, best_so_far, keys);
      if (launch.element && !launch.last) continue;
      from = to;
      std::swap(to, other);
    }
  }

  void set_tiles(const PlannedLaunch& launch, Tiling& tiling) const {
    std::int64_t tiles = tiling.channels.batch * tiling.channels.count;
    for (int axis = 0; axis < kSpatialAxes; ++axis) {
      tiling.size[axis] = static_cast<int>(call_.size[axis]);
      tiling.tile[axis] = launch.tile.size[axis];
      tiling.before[axis] = launch.span.before[axis];
      tiling.after[axis] = launch.span.after[axis];
      tiling.tiles[axis] = (tiling.size[axis] - 1) / tiling.tile[axis] + 1;
      tiles *= tiling.tiles[axis];
    }
    tiling.num_tiles = tiles;
    tiling.row_items = row_items(tiling.tile[2] + tiling.before[2] + tiling.after[2]);
    tiling.plane_items = tiling.row_items * (tiling.tile[1] + tiling.before[1] + tiling.after[1]);
    tiling.buffer_items = static_cast<int>(buffer_items(tiling.tile, launch.span));
    tiling.border = call_.border;
    tiling.border_value = call_.border_value;
  }

  void start(const PlannedLaunch& launch, const Tiling& tiling, const void* best_so_far,
             bool keys) const {
    switch (call_.dtype) {
      case DType::kFloat64:
        return keys ? start_as<DoubleKeys, double>(launch, tiling, best_so_far)
                    : start_as<Values<double>, double>(launch, tiling, best_so_far);
      case DType::kFloat32:
        return keys ? start_as<SingleKeys, float>(launch, tiling, best_so_far)
                    : start_as<Values<float>, float>(launch, tiling, best_so_far);
      case DType::kBFloat16:
        return keys ? start_as<SingleKeys, __nv_bfloat16>(launch, tiling, best_so_far)
                    : start_as<Values<float>, __nv_bfloat16>(launch, tiling, best_so_far);
      case DType::kFloat16:
        return keys ? start_as<SingleKeys, __half>(launch, tiling, best_so_far)
                    : start_as<Values<float>, __half>(launch, tiling, best_so_far);
    }
  }

  template <class Items, class T>
  void start_as(const PlannedLaunch& launch, const Tiling& tiling, const void* best_so_far) const {
    const int blocks = static_cast<int>(std::min(tiling.num_tiles, kMostBlocks));
    const int bytes = 2 * tiling.buffer_items * static_cast<int>(sizeof(typename Items::Item));
    if (launch.element) {
      ElementTask task = launch.task;
      task.best_so_far = best_so_far;
      launch_with_shared("morphology_element_kernel", morphology_element_kernel<Items, T>, blocks,
                         kMorphologyThreads, bytes, stream_, tiling, task);
    } else {
      launch_with_shared("morphology_boxes_kernel", morphology_boxes_kernel<Items, T>, blocks,
                         kMorphologyThreads, bytes, stream_, tiling, launch.boxes);
    }
  }

  const Morphology& call_;
  const SourceIndex source_;
  const Device& device_;
  cudaStream_t stream_;
  float* sums_ = nullptr;
  char* planes_ = nullptr;
};

bool empty(const Morphology& call) {
  return call.batch == 0 || call.channels == 0 || call.volume() == 0;
}

}  // namespace

std::int64_t morphology_workspace_bytes(const Morphology& call, int device) {
  for (const MorphologyProgram& program : call.programs) {
    if (program.size() > kMostMorphologyTerms) {
      throw std::invalid_argument("morphology: a program may have at most 64 terms");
    }
  }
  if (empty(call)) return 0;
  return sum_bytes(call) + Launcher(call, Device(device), nullptr, nullptr).plane_bytes();
}

void morphology(const Morphology& call, void* workspace, int device, void* stream) {
  if (empty(call)) return;
  const DeviceGuard guard(device);
  const Device about(device);
  Launcher(call, about, workspace, static_cast<cudaStream_t>(stream)).run();
}

}  // namespace dpfast::cuda
