// conv_grad on CUDA: one launch for all samples, then up to three small ones that add what blocks
// have left (splits of the positions, the anchor's sums, squares).
//
// Floor: 2 * samples * groups * m * n * taps * positions operations at the rate of the form, and
// anchor and moving read once.
#include <algorithm>
#include <limits>
#include <stdexcept>

#include "cuda/conv_grad.cuh"
#include "cuda/conv_grad_cuda.h"
#include "cuda/launch.cuh"

namespace dpfast::cuda {
namespace {

constexpr std::int64_t kMaxInt = std::numeric_limits<int>::max();
constexpr std::int64_t kThreadsWanted = 1024;  // of a processor: about two rounds of what fits
constexpr std::int64_t kLeastPositions = 256;  // of a split: its tile must be worth storing
constexpr std::int64_t kStep = 32;  // a split is whole steps of every form, and whole 16 bytes
constexpr std::int64_t kMaxPartials = 16ll << 20;  // elements: 64 MB
constexpr int kTileM[] = {16, 16, 32, 64, 64, 128};
constexpr int kTileN[] = {32, 128, 64, 32, 64, 64};
constexpr int kFloatThreads[] = {32, 64, 64, 64, 64, 128};
constexpr int kTensorThreads = 128;
constexpr int kTiles = 6;
constexpr int kThreadsToFill = 512;  // of a processor, to hide what a warp waits for

enum class Form { kFloat, kTf32, kBFloat16, kFloat16 };

Form form_of(const ConvGrad& conv, const ConvGradOptions& options) {
  switch (options.dtype) {
    case DType::kFloat32:
      return options.allow_tf32 && conv.out != nullptr ? Form::kTf32 : Form::kFloat;
    case DType::kBFloat16:
      return Form::kBFloat16;
    case DType::kFloat16:
      return Form::kFloat16;
    default:
      throw std::invalid_argument("conv_grad: dtype must be float32, bfloat16 or float16");
  }
}

std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

int narrow(std::int64_t value, const char* what) {
  if (value > kMaxInt) {
    throw std::invalid_argument(std::string("conv_grad: too many ") + what + " for CUDA");
  }
  return static_cast<int>(value);
}

struct Plan {
  int tile = 0;
  std::int64_t split_positions = kStep;

  // The tile that takes the least time: instructions per position over the share of the processors'
  // warps that its blocks fill. A product takes 1/32 of one (less on tensor cores), a gathered
  // value about eleven; tiles below one another gather the same values.
  Plan(const ConvGrad& conv, Form form, int processors) {
    const double product = form == Form::kFloat ? 1.1 : form == Form::kTf32 ? 0.25 : 0.15;
    double least = 0.0;
    for (int t = 0; t < kTiles; ++t) {
      Plan other;
      other.tile = t;
      const int threads = form == Form::kFloat ? kFloatThreads[t] : kTensorThreads;
      other.split(conv, processors * kThreadsWanted / threads);
      const double work = static_cast<double>(other.tiles_m(conv) * other.tiles_n(conv)) *
                          (product * kTileM[t] * kTileN[t] + 11.0 * kTileN[t] + 2.0 * kTileM[t]);
      const double all_threads =
          static_cast<double>(other.blocks(conv, other.splits(conv)) * threads);
      const double filled =
          std::min(1.0, all_threads / (static_cast<double>(processors) * kThreadsToFill));
      const double time = work / std::max(filled, 1e-9);
      if (t == 0 || time < least) {
        least = time;
        *this = other;
      }
    }
  }

  static std::int64_t columns(const ConvGrad& conv) { return conv.n * volume(conv.kernel); }
  std::int64_t tiles_m(const ConvGrad& conv) const { return divide_up(conv.m, kTileM[tile]); }
  std::int64_t tiles_n(const ConvGrad& conv) const {
    return std::max<std::int64_t>(1, divide_up(columns(conv), kTileN[tile]));
  }
  std::int64_t splits(const ConvGrad& conv) const {
    return std::max<std::int64_t>(1, divide_up(volume(conv.anchor_size), split_positions));
  }
  std::int64_t blocks(const ConvGrad& conv, std::int64_t splits) const {
    return conv.samples * conv.groups * splits * tiles_n(conv) * tiles_m(conv);
  }
  // Blocks of one sample in the pass over the splits.
  static std::int64_t split_blocks(const ConvGrad& conv) {
    return divide_up(conv.groups * conv.m * columns(conv), kSplitElements);
  }
  std::int64_t square_parts(const ConvGrad& conv) const {
    return splits(conv) > 1 ? split_blocks(conv) : conv.groups * tiles_n(conv) * tiles_m(conv);
  }

 private:
  Plan() = default;

  void split(const ConvGrad& conv, std::int64_t blocks_wanted) {
    const std::int64_t positions = volume(conv.anchor_size);
    const std::int64_t wanted =
        divide_up(blocks_wanted, std::max<std::int64_t>(1, blocks(conv, 1)));
    const std::int64_t outputs =
        std::max<std::int64_t>(1, conv.samples * conv.groups * conv.m * columns(conv));
    const std::int64_t count = std::max<std::int64_t>(
        1, std::min({wanted, positions / kLeastPositions, kMaxPartials / outputs}));
    split_positions = std::max(kStep, divide_up(divide_up(positions, count), kStep) * kStep);
  }
};

// Offsets within a sample are 32-bit: in elements those of the anchor and of its gradients, in
// bytes those of everything a tap may look at, inside or not.
void check_sizes(const ConvGrad& conv) {
  const std::int64_t most = 1ll << 29;  // of any factor below; kOutside leaves as much room
  std::int64_t reach = std::max<std::int64_t>(1, conv.n) * 4;
  std::int64_t elements = std::max<std::int64_t>(1, conv.groups * conv.m);
  std::int64_t weights = conv.groups * conv.m * conv.n;
  const auto grow = [&](std::int64_t& product, std::int64_t by) {
    if (by > most || product > kMaxInt) narrow(kMaxInt + 1, "elements in a sample");
    product *= std::max<std::int64_t>(1, by);
    narrow(product, "elements in a sample");
  };
  for (int axis = 0; axis < kConvAxes; ++axis) {
    for (const std::int64_t factor : {conv.stride[axis], conv.dilation[axis], conv.padding[axis]}) {
      if (factor > most) narrow(kMaxInt + 1, "elements in a sample");
    }
    grow(reach, std::max(conv.moving_size[axis],
                         conv.anchor_size[axis] * conv.stride[axis] + conv.padding[axis]) +
                    (conv.kernel[axis] - 1) * conv.dilation[axis]);
    grow(elements, conv.anchor_size[axis]);
    grow(weights, conv.kernel[axis]);
  }
}

class ConvLauncher {
 public:
  ConvLauncher(const ConvGrad& conv, const ConvGradOptions& options, const Plan& plan,
               cudaStream_t stream)
      : conv_(conv), form_(form_of(conv, options)), plan_(plan), stream_(stream) {
    check_sizes(conv);
    const std::int64_t splits = plan.splits(conv);
    const std::int64_t images = conv.samples * conv.groups;
    blocks_ = narrow(plan.blocks(conv, splits), "blocks");
    narrow(conv.samples * plan.split_blocks(conv), "blocks");
    task_.anchor = conv.anchor;
    task_.moving = conv.moving;
    task_.out = conv.out;
    task_.anchor_sums = conv.anchor_sums;
    task_.images = images;
    task_.out_m_stride = narrow(conv.out_m_stride, "elements in a sample");
    task_.out_n_stride = narrow(conv.out_n_stride, "elements in a sample");
    task_.groups = static_cast<int>(conv.groups);
    task_.m = static_cast<int>(conv.m);
    task_.n = static_cast<int>(conv.n);
    task_.columns = static_cast<int>(Plan::columns(conv));
    task_.taps = static_cast<int>(volume(conv.kernel));
    task_.positions = static_cast<int>(volume(conv.anchor_size));
    task_.split_positions = narrow(plan.split_positions, "positions");
    task_.splits = static_cast<int>(splits);
    task_.tiles_m = static_cast<int>(plan.tiles_m(conv));
    task_.tiles_n = static_cast<int>(plan.tiles_n(conv));
    task_.square_parts = narrow(plan.square_parts(conv), "blocks");
    for (int axis = 0; axis < kConvAxes; ++axis) {
      task_.anchor_size[axis] = static_cast<int>(conv.anchor_size[axis]);
      task_.moving_size[axis] = static_cast<int>(conv.moving_size[axis]);
      task_.kernel[axis] = static_cast<int>(conv.kernel[axis]);
      task_.stride[axis] = static_cast<int>(conv.stride[axis]);
      task_.padding[axis] = static_cast<int>(conv.padding[axis]);
      task_.dilation[axis] = static_cast<int>(conv.dilation[axis]);
    }
    const auto divider = [](std::int64_t by) {
      return Divider(static_cast<std::uint32_t>(std::max<std::int64_t>(1, by)));
    };
    task_.by_taps = divider(task_.taps);
    task_.by_row = divider(conv.anchor_size[2]);
    task_.by_plane = divider(conv.anchor_size[1] * conv.anchor_size[2]);
    task_.flip_taps = conv.flip_taps;
    const std::int64_t item = item_size(options.dtype);
    task_.anchor_vectors =
        reinterpret_cast<std::uintptr_t>(conv.anchor) % 16 == 0 && task_.positions * item % 16 == 0;

    char* next = static_cast<char*>(options.workspace);
    const auto take = [&](std::int64_t count, std::int64_t size) {
      char* mine = next;
      next += divide_up(count * size, 8) * 8;
      bytes_ += divide_up(count * size, 8) * 8;
      return mine;
    };
    if (conv.square_norms != nullptr) {
      task_.squares = reinterpret_cast<double*>(take(conv.samples * task_.square_parts, 8));
    }
    if (splits > 1) {
      if (conv.anchor_sums != nullptr) {
        task_.sum_partials = reinterpret_cast<double*>(take(splits * images * conv.m, 8));
      }
      task_.partials = reinterpret_cast<float*>(take(splits * images * conv.m * task_.columns, 4));
    }
  }

  std::int64_t workspace_bytes() const { return bytes_; }

  void run() const {
    if (conv_.samples == 0) return;
    if (blocks_ > 0) {
      switch (form_) {
        case Form::kFloat:
          run_float();
          break;
        case Form::kTf32:
          run_tensor<float>();
          break;
        case Form::kBFloat16:
          run_tensor<__nv_bfloat16>();
          break;
        case Form::kFloat16:
          run_tensor<__half>();
          break;
      }
    }
    if (task_.splits > 1) {
      const int blocks = static_cast<int>(Plan::split_blocks(conv_));
      if (blocks > 0) {
        launch("conv_grad_splits_kernel", conv_grad_splits_kernel,
               static_cast<int>(conv_.samples) * blocks, kSplitThreads, stream_, task_, blocks);
      }
      const std::int64_t channels = task_.images * task_.m;
      if (task_.anchor_sums != nullptr && channels > 0) {
        launch("conv_grad_anchor_sums_kernel", conv_grad_anchor_sums_kernel,
               narrow(divide_up(channels, kSplitThreads), "channels"), kSplitThreads, stream_,
               task_);
      }
    }
    if (task_.squares != nullptr) {
      const double* squares = task_.squares;
      launch("conv_grad_norms_kernel", conv_grad_norms_kernel, narrow(conv_.samples, "samples"),
             kFinishThreads, stream_, squares, task_.square_parts, conv_.square_norms);
    }
  }

 private:
  template <class Form>
  void start() const {
    launch("conv_grad_kernel", conv_grad_kernel<Form>, blocks_, Form::Tile::kThreads, stream_,
           task_);
  }

  // In the order of kTileM and kTileN.
  void run_float() const {
    switch (plan_.tile) {
      case 0:
        return start<FloatForm<ConvTile<float, 16, 32, 32>, 4, 4>>();
      case 1:
        return start<FloatForm<ConvTile<float, 16, 128, 64>, 4, 8>>();
      case 2:
        return start<FloatForm<ConvTile<float, 32, 64, 64>, 4, 8>>();
      case 3:
        return start<FloatForm<ConvTile<float, 64, 32, 64>, 8, 4>>();
      case 4:
        return start<FloatForm<ConvTile<float, 64, 64, 64>, 8, 8>>();
      default:
        return start<FloatForm<ConvTile<float, 128, 64, 128>, 8, 8>>();
    }
  }

  template <class T>
  void run_tensor() const {
    switch (plan_.tile) {
      case 0:
        return start<TensorForm<ConvTile<T, 16, 32, 128>, 1, 4>>();
      case 1:
        return start<TensorForm<ConvTile<T, 16, 128, 128>, 1, 4>>();
      case 2:
        return start<TensorForm<ConvTile<T, 32, 64, 128>, 2, 2>>();
      case 3:
        return start<TensorForm<ConvTile<T, 64, 32, 128>, 4, 1>>();
      case 4:
        return start<TensorForm<ConvTile<T, 64, 64, 128>, 2, 2>>();
      default:
        return start<TensorForm<ConvTile<T, 128, 64, 128>, 2, 2>>();
    }
  }

  const ConvGrad& conv_;
  Form form_;
  Plan plan_;
  cudaStream_t stream_;
  ConvTask task_{};
  int blocks_ = 0;
  std::int64_t bytes_ = 0;
};

Plan plan_for(const ConvGrad& conv, const ConvGradOptions& options, int device) {
  int processors = 1;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute");
  return Plan(conv, form_of(conv, options), processors);
}

}  // namespace

std::int64_t conv_grad_workspace_bytes(const ConvGrad& conv, const ConvGradOptions& options,
                                       int device) {
  check_sizes(conv);
  return ConvLauncher(conv, options, plan_for(conv, options, device), nullptr).workspace_bytes();
}

void conv_grad(const ConvGrad& conv, const ConvGradOptions& options, int device, void* stream) {
  check_sizes(conv);
  const DeviceGuard guard(device);
  ConvLauncher(conv, options, plan_for(conv, options, device), static_cast<cudaStream_t>(stream))
      .run();
}

}  // namespace dpfast::cuda
