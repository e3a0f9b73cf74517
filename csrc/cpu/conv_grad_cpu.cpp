// Floor: 2 * samples * groups * m * n * taps * positions operations, and anchor and moving read
// once. A task is a sample's group with up to four vectors of anchor channels; it walks blocks of
// positions whose copies stay in L2.
#include "cpu/conv_grad_cpu.h"

#include <algorithm>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/thread_pool.h"

namespace dpfast::cpu {
namespace {

// Elements of a block's copies: 192 KB each.
constexpr std::int64_t kBlockElements = 48 << 10;

std::int64_t moved(const ConvGrad& conv, int axis, std::int64_t positions) {
  return (positions - 1) * conv.stride[axis] + (conv.kernel[axis] - 1) * conv.dilation[axis] + 1;
}

// Depths and heights of a block: as many as its copies may hold, at least one.
struct BlockSize {
  std::int64_t size[2] = {1, 1};
  std::int64_t anchor, moving;  // elements of the copies

  BlockSize(const ConvGrad& conv, std::int64_t channels) {
    for (const int axis : {1, 0}) {
      while (size[axis] < conv.anchor_size[axis] && fits(conv, channels, axis)) ++size[axis];
      if (size[axis] < conv.anchor_size[axis]) break;
    }
    measure(conv, channels);
  }

 private:
  void measure(const ConvGrad& conv, std::int64_t channels) {
    anchor = size[0] * size[1] * conv.anchor_size[2] * channels;
    moving = conv.n * moved(conv, 0, size[0]) * moved(conv, 1, size[1]) *
             moved(conv, 2, conv.anchor_size[2]);
  }

  bool fits(const ConvGrad& conv, std::int64_t channels, int axis) {
    ++size[axis];
    measure(conv, channels);
    --size[axis];
    return anchor <= kBlockElements && moving <= kBlockElements;
  }
};

struct Buffers {
  std::vector<float> anchor, moving, sums, anchor_sums;
  std::vector<std::int64_t> offsets;
  std::vector<float*> rows;
};

}  // namespace

void conv_grad(const ConvGrad& conv, int num_threads) {
  const Kernels& isa = kernels();
  const std::int64_t taps = volume(conv.kernel);
  const std::int64_t parts = (conv.m + isa.conv_channels - 1) / isa.conv_channels;
  const std::int64_t tasks = conv.samples * conv.groups * parts;
  const std::int64_t lanes = isa.conv_lanes;
  const std::int64_t widest = std::min(isa.conv_channels, (conv.m + lanes - 1) / lanes * lanes);
  if (tasks == 0 || conv.n == 0 || taps == 0 || volume(conv.anchor_size) == 0) {
    if (conv.out != nullptr) {
      std::fill(conv.out, conv.out + conv.samples * conv.groups * conv.m * conv.n * taps, 0.0f);
    }
    if (conv.square_norms != nullptr) {
      std::fill(conv.square_norms, conv.square_norms + conv.samples, 0.0);
    }
    if (conv.anchor_sums != nullptr) {
      std::fill(conv.anchor_sums, conv.anchor_sums + conv.samples * conv.groups * conv.m, 0.0f);
    }
    return;
  }
  const BlockSize block(conv, widest);
  std::vector<double> squares(static_cast<std::size_t>(tasks));
  parallel_for(tasks, num_threads, [&](std::int64_t index) {
    thread_local Buffers buffers;
    const auto fit = [](auto& buffer, std::int64_t size) {
      if (buffer.size() < static_cast<std::size_t>(size)) buffer.resize(size);
      return buffer.data();
    };
    const std::int64_t rows = conv.n * conv.kernel[0] * conv.kernel[1];
    const ConvWorkspace workspace{fit(buffers.anchor, block.anchor),
                                  fit(buffers.moving, block.moving),
                                  fit(buffers.sums, conv.n * taps * widest),
                                  fit(buffers.anchor_sums, widest),
                                  fit(buffers.offsets, rows),
                                  fit(buffers.rows, rows)};
    ConvTask task{};
    task.sample = index / (conv.groups * parts);
    task.group = index / parts % conv.groups;
    task.first_channel = index % parts * isa.conv_channels;
    task.num_channels = std::min(isa.conv_channels, conv.m - task.first_channel);
    task.block[0] = block.size[0];
    task.block[1] = block.size[1];
    squares[static_cast<std::size_t>(index)] = isa.conv_grad(conv, task, workspace);
  });
  if (conv.square_norms == nullptr) return;
  // In one order, whoever was first.
  const std::int64_t tasks_of_sample = tasks / conv.samples;
  for (std::int64_t b = 0; b < conv.samples; ++b) {
    double sum = 0.0;
    for (std::int64_t i = 0; i < tasks_of_sample; ++i) sum += squares[b * tasks_of_sample + i];
    conv.square_norms[b] = sum;
  }
}

void ghost_norm(const GhostNorm& ghost, int num_threads) {
  const Kernels& isa = kernels();
  parallel_for(ghost.samples, num_threads,
               [&](std::int64_t b) { ghost.square_norms[b] = isa.ghost_norm(ghost, b); });
}

}  // namespace dpfast::cpu
