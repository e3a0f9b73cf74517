// The gradient goes back along the index that the forward pass has left. Floor: the output's
// gradient and the index read once, the input's gradient written once.
//
// A sum of neighbouring outputs that took the same element waits for itself. So a slice is cut into
// bands along the height, of which the first outputs are taken, then the second ones, and so on:
// the bands are so wide that whatever a band takes from its predecessor it has taken before that
// one comes to its end. Each sum thus has one order: slices in turn, of each the later bands first.
// (Bands along the depth would spread over more pages than a processor remembers.) A thread owns
// its own channels; or, where they are few, a range of the slowest axis, and looks for what arrives
// there among all outputs from which it can be reached, in the same order.
#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/morphology_cpu.h"
#include "cpu/thread_pool.h"
#include "math/source_index.h"

namespace dpfast::cpu {
namespace {

constexpr std::int64_t kLargeChannel = 1 << 16;
constexpr std::int64_t kLine = 64;    // bytes
constexpr std::int64_t kAhead = 256;  // elements; memory answers meanwhile

template <class Index>
constexpr Index kNoSource = static_cast<Index>(Index{1} << (8 * sizeof(Index) - 1));

float widen(const std::uint16_t* halves, std::int64_t i) {
  const std::uint32_t bits = static_cast<std::uint32_t>(halves[i]) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

float widen(const float* values, std::int64_t i) { return values[i]; }
double widen(const double* values, std::int64_t i) { return values[i]; }

std::uint16_t narrow(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<std::uint16_t>(value == value ? rounded : 0x7fc0u);
}

// From what an index stores to a distance in memory: the same, or looked up.
struct Same {
  std::int64_t operator()(std::int64_t stored) const { return stored; }
};

struct LookedUp {
  const std::int32_t* middle;
  std::int64_t operator()(std::int64_t stored) const { return middle[stored]; }
};

std::vector<std::int32_t> distances(const SourceIndex& index) {
  std::vector<std::int32_t> all;
  for (std::int32_t i = -index.middle; i <= index.middle; ++i) {
    all.push_back(math::source_distance(index, i));
  }
  return all;
}

// sums[i + distance(index[i])] += sign * grad[i] for the outputs i of a channel.
template <class Grad, class Index, class Sum, class Distance>
struct Scatter {
  const Grad* grad;
  const Index* index;
  Distance distance;
  Sum sign;
  Sum* sums;

  void take(std::int64_t i) const {
    if (index[i] != kNoSource<Index>) sums[i + distance(index[i])] += sign * widen(grad, i);
  }

  // What a block of outputs will need: its gradient and index, which are hardly read again and
  // are to displace nothing; and where `next` is not null, sums that are next to begin at zero.
  template <int kBands>
  static void ask(const Grad* grad, const Index* index, const Sum* next, std::int64_t band) {
    for (int b = 0; b < kBands; ++b) {
      __builtin_prefetch(grad + b * band, 0, 0);
      __builtin_prefetch(index + b * band, 0, 0);
      if (next != nullptr) __builtin_prefetch(next + b * band, 1, 2);
    }
  }

  // `kBands` bands of the same length, side by side; then what is left of [begin, end).
  template <int kBands>
  void take_bands(std::int64_t begin, std::int64_t end, std::int64_t band, const Sum* next) const {
    constexpr std::int64_t kBlock = kLine / sizeof(Sum);
    for (std::int64_t first = begin; first < begin + band; first += kBlock) {
      ask<kBands>(grad + first + kAhead, index + first + kAhead,
                  next == nullptr ? next : next + (first - begin), band);
      const std::int64_t last = std::min(first + kBlock, begin + band);
      for (std::int64_t i = first; i < last; ++i) {
#pragma GCC unroll 8
        for (int b = kBands - 1; b >= 0; --b) take(b * band + i);
      }
    }
    for (std::int64_t i = begin + kBands * band; i < end; ++i) take(i);
  }

  // Those in [begin, end) whose source lies in [low, high).
  void take_within(std::int64_t begin, std::int64_t end, std::int64_t low,
                   std::int64_t high) const {
    for (std::int64_t i = begin; i < end; ++i) {
      if (index[i] == kNoSource<Index>) continue;
      const std::int64_t source = i + distance(index[i]);
      if (source >= low && source < high) sums[source] += sign * widen(grad, i);
    }
  }
};

// Elements [low, high) of a channel, and the outputs that may have taken them.
struct Share {
  std::int64_t low, high, begin, end;
};

// In which bands a slice is taken.
struct Bands {
  int count;
  std::int64_t length;
};

Bands bands_of(const Morphology& call) {
  const std::int64_t rows = call.size[1], row = call.size[2];
  for (const int count : {4, 2}) {
    // A wrapped border takes from the other end.
    const bool near = call.border != Border::kWrap || call.reach[1] == 0;
    if (near && rows / count >= 2 * (call.reach[1] + 1)) return {count, rows / count * row};
  }
  return {1, rows * row};
}

// As take_bands does, for one thread's share.
template <class Scatter>
void take_slice_within(const Scatter& scatter, std::int64_t begin, std::int64_t end,
                       const Bands& bands, const Share& share) {
  const auto take = [&](std::int64_t from, std::int64_t to) {
    scatter.take_within(std::max(share.begin, from), std::min(share.end, to), share.low,
                        share.high);
  };
  for (int b = bands.count - 1; b >= 0; --b) {
    take(begin + b * bands.length, begin + (b + 1) * bands.length);
  }
  take(begin + bands.count * bands.length, end);
}

template <class Grad, class Index, class Sum, class Distance>
void collect(const Morphology& call, Distance distance, std::int64_t channel,
             const Grad* grad_output, const Bands& bands, const Share& share, Sum* sums,
             const Sum* sums_after) {
  const std::int64_t volume = call.volume(), at = channel * volume;
  const std::int64_t tensor = call.batch * call.channels * volume;
  const Index* index = static_cast<const Index*>(call.index) + at;
  // Sums begin at zero shortly before their first element arrives, to be in the cache then.
  std::int64_t begun = share.low;
  const auto begin_sums = [&](std::int64_t end) {
    end = std::clamp(end, begun, share.high);
    std::fill(sums + begun, sums + end, Sum{0});
    begun = end;
  };
  for (const MorphologyTerm& term : call.program(channel % call.channels)) {
    const Scatter<Grad, Index, Sum, Distance> scatter{grad_output + at, index, distance,
                                                      static_cast<Sum>(term.sign), sums};
    if (term.stages.empty()) {
      begin_sums(share.high);
      for (std::int64_t i = share.low; i < share.high; ++i) {
        sums[i] += scatter.sign * widen(scatter.grad, i);
      }
      continue;
    }
    index += tensor;
    const bool all = share.low == 0 && share.high == volume;
    const std::int64_t slice = call.size[1] * call.size[2];
    const std::int64_t ahead = call.border == Border::kWrap ? volume : (call.reach[0] + 1) * slice;
    for (std::int64_t first = 0; first < volume; first += slice) {
      begin_sums(first + ahead);
      const Sum* next = begun < share.high ? sums + begun : sums_after;
      if (!all) {
        take_slice_within(scatter, first, first + slice, bands, share);
      } else if (bands.count == 4) {
        scatter.template take_bands<4>(first, first + slice, bands.length, next);
      } else if (bands.count == 2) {
        scatter.template take_bands<2>(first, first + slice, bands.length, next);
      } else {
        scatter.template take_bands<1>(first, first + slice, bands.length, next);
      }
    }
  }
}

template <class Grad, class Index, class Sum, class Distance>
void run(const Morphology& call, const MorphologyBackward& grads, Distance distance,
         int num_threads) {
  const std::int64_t channels = call.batch * call.channels, volume = call.volume();
  if (channels == 0 || volume == 0) return;
  const Grad* grad_output = static_cast<const Grad*>(grads.grad_output);
  constexpr bool kDirect = sizeof(Grad) == sizeof(Sum);
  const int slow = call.size[0] > 1 ? 0 : 1;
  const Bands bands = bands_of(call);
  const std::int64_t lines = call.size[slow], line = volume / lines;
  const bool together = call.border != Border::kWrap && num_threads > 1 &&
                        channels < 4 * num_threads && volume >= kLargeChannel &&
                        lines >= 2 * call.reach[slow] * num_threads;
  const std::int64_t parts = together ? num_threads : 1;
  // Sums of a narrower gradient are taken in single precision.
  std::vector<Sum> storage;
  const std::int64_t workers = std::min<std::int64_t>(num_threads, channels * parts);
  if (!kDirect) storage.resize(static_cast<std::size_t>((together ? 1 : workers) * volume));
  const auto part = [&](std::int64_t channel, std::int64_t p, Sum* sums, bool goes_on) {
    const std::int64_t low = lines * p / parts, high = lines * (p + 1) / parts;
    const std::int64_t begin = std::max<std::int64_t>(0, low - call.reach[slow]);
    const std::int64_t end = std::min(lines, high + call.reach[slow]);
    char* result = static_cast<char*>(grads.grad_input) + channel * volume * sizeof(Grad);
    if (kDirect) sums = reinterpret_cast<Sum*>(result);
    const Share share{low * line, high * line, begin * line, end * line};
    const Sum* after = kDirect && goes_on ? sums + volume : nullptr;
    collect<Grad, Index, Sum>(call, distance, channel, grad_output, bands, share, sums, after);
    if (!kDirect) {
      std::uint16_t* halves = reinterpret_cast<std::uint16_t*>(result);
      for (std::int64_t i = low * line; i < high * line; ++i) {
        halves[i] = narrow(static_cast<float>(sums[i]));
      }
    }
  };
  if (together) {
    for (std::int64_t c = 0; c < channels; ++c) {
      parallel_for(parts, num_threads, [&](std::int64_t p) { part(c, p, storage.data(), false); });
    }
    return;
  }
  parallel_for(workers, num_threads, [&](std::int64_t worker) {
    Sum* sums = storage.data() + (kDirect ? 0 : worker * volume);
    const std::int64_t last = channels * (worker + 1) / workers;
    for (std::int64_t c = channels * worker / workers; c < last; ++c) {
      part(c, 0, sums, c + 1 < last);
    }
  });
}

template <class Index, class Distance>
void dispatch(const Morphology& call, const MorphologyBackward& grads, Distance distance,
              int num_threads) {
  if (call.dtype == DType::kFloat64) {
    run<double, Index, double>(call, grads, distance, num_threads);
  } else if (call.dtype == DType::kFloat32) {
    run<float, Index, float>(call, grads, distance, num_threads);
  } else {
    run<std::uint16_t, Index, float>(call, grads, distance, num_threads);
  }
}

}  // namespace

void morphology_backward(const Morphology& call, const MorphologyBackward& grads, int num_threads) {
  const SourceIndex source = math::source_index(call);
  if (call.index_bits == 32) {
    dispatch<std::int32_t>(call, grads, Same{}, num_threads);
  } else if (!source.boxed) {
    dispatch<std::int16_t>(call, grads, Same{}, num_threads);
  } else {
    const std::vector<std::int32_t> all = distances(source);
    dispatch<std::int16_t>(call, grads, LookedUp{all.data() + source.middle}, num_threads);
  }
}

}  // namespace dpfast::cpu
