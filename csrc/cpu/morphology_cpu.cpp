// Floor: the input read once, the output (and the index) written once.
//
// A chain's windows are separable: stages alternate in the order of the axes (width, height, depth;
// depth, height, width; ...), so that two windows along one axis follow one another while their
// line is in the cache. A maximum of keys does not depend on that order.
#include "cpu/morphology_cpu.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>

#include "cpu/kernels.h"
#include "cpu/thread_pool.h"

namespace dpfast::cpu {
namespace {

constexpr std::int64_t kAlignment = 64;
// Below this a channel is not worth more than one thread.
constexpr std::int64_t kLargeChannel = 1 << 16;

struct Free {
  void operator()(char* p) const { ::operator delete(p, std::align_val_t{kAlignment}); }
};
using Memory = std::unique_ptr<char, Free>;

Memory allocate(std::int64_t bytes) {
  return Memory(static_cast<char*>(::operator new(
      static_cast<std::size_t>(std::max<std::int64_t>(bytes, 1)), std::align_val_t{kAlignment})));
}

// One sweep of a chain: windows along an axis, or an element.
struct Step {
  int axis = 2;
  std::vector<WindowStep> windows;
  const MorphologyStage* element = nullptr;
  bool negated = false;        // the items before it
  bool negate_before = false;  // an element's
};

// The sweeps of a chain. The first reads the input along rows; the last one, whatever it is, writes
// the output.
std::vector<Step> plan(const MorphologyTerm& term) {
  std::vector<Step> steps(1);
  bool negated = !term.stages.empty() && !term.stages.front().dilate;
  steps.front().negated = negated;
  bool backwards = false;
  for (const MorphologyStage& stage : term.stages) {
    const bool wanted = !stage.dilate;
    if (stage.kind != ElementKind::kBox) {
      Step step;
      step.element = &stage;
      step.negated = negated;
      step.negate_before = negated != wanted;
      negated = wanted;
      steps.push_back(step);
      continue;
    }
    for (int i = 0; i < kSpatialAxes; ++i) {
      const int axis = backwards ? i : kSpatialAxes - 1 - i;
      if (stage.low[axis] == 0 && stage.high[axis] == 0) continue;
      if (steps.back().element != nullptr || steps.back().axis != axis) {
        Step step;
        step.axis = axis;
        step.negated = negated;
        steps.push_back(step);
      }
      steps.back().windows.push_back({stage.low[axis], stage.high[axis], negated != wanted});
      negated = wanted;
    }
    backwards = !backwards;
  }
  if (steps.back().element != nullptr) {  // which writes items
    Step step;
    step.negated = negated;
    steps.push_back(step);
  }
  return steps;
}

bool ends_negated(const std::vector<Step>& steps) {
  bool negated = steps.back().negated;
  for (const WindowStep& window : steps.back().windows) negated = negated != window.negate_before;
  return negated;
}

Sweep sweep_of(const Step& step) {
  return {step.axis, step.windows.data(), static_cast<int>(step.windows.size())};
}

ElementSweep element_sweep_of(const Step& step) {
  const MorphologyStage& stage = *step.element;
  return {stage.low,
          stage.high,
          stage.runs.data(),
          stage.taps.data(),
          static_cast<std::int64_t>(stage.runs.size()),
          static_cast<std::int64_t>(stage.taps.size()),
          step.negate_before,
          nullptr,
          nullptr};
}

ItemKind kind_of(DType dtype, bool keys) {
  if (dtype == DType::kFloat64) return keys ? ItemKind::kDoubleKey : ItemKind::kDouble;
  return keys ? ItemKind::kSingleKey : ItemKind::kSingle;
}

// One program's term, planned once for all channels that it is for.
struct PlannedTerm {
  int sign;
  bool moves;  // or is the input itself
  std::vector<Step> steps;
};

class Call {
 public:
  Call(const Morphology& call, int num_threads) : call_(call), threads_(num_threads) {
    for (const MorphologyProgram& program : call.programs) {
      std::vector<PlannedTerm> terms;
      for (const MorphologyTerm& term : program) {
        terms.push_back({term.sign, !term.stages.empty(), plan(term)});
        for (const Step& step : terms.back().steps) two_planes_ |= step.element != nullptr;
      }
      planned_.push_back(std::move(terms));
    }
  }

  void run() {
    const std::int64_t channels = call_.batch * call_.channels;
    if (channels == 0 || call_.volume() == 0) return;
    const std::int64_t item = item_bytes(kind_of(call_.dtype, true));  // the larger ones
    plane_bytes_ = round_up(call_.size[2], most_lanes()) * call_.size[0] * call_.size[1] * item;
    plane_bytes_ = round_up(plane_bytes_ + kAlignment, kAlignment);
    workspace_bytes_ = round_up(largest_workspace(), kAlignment);
    const std::int64_t planes = two_planes_ ? 2 : 1;
    // Channels side by side; or, where they are few and large, one after the other by all threads.
    const bool together =
        threads_ > 1 && channels < 4 * threads_ && call_.volume() >= kLargeChannel;
    const std::int64_t workers = std::min<std::int64_t>(threads_, together ? threads_ : channels);
    const std::int64_t plane_sets = together ? 1 : workers;
    const Memory memory = allocate(plane_sets * planes * plane_bytes_ + workers * workspace_bytes_);
    char* workspaces = memory.get() + plane_sets * planes * plane_bytes_;
    if (together) {
      for (std::int64_t c = 0; c < channels; ++c) {
        run_channel(c, memory.get(), workspaces, static_cast<int>(workers));
      }
      return;
    }
    std::atomic<std::int64_t> next{0};
    parallel_for(workers, threads_, [&](std::int64_t worker) {
      for (std::int64_t c = next++; c < channels; c = next++) {
        run_channel(c, memory.get() + worker * planes * plane_bytes_,
                    workspaces + worker * workspace_bytes_, 1);
      }
    });
  }

 private:
  static std::int64_t round_up(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }

  std::int64_t most_lanes() const {
    std::int64_t lanes = 1;
    for (const bool keys : {false, true}) lanes = std::max(lanes, passes(keys).lanes);
    return lanes;
  }

  const MorphologyPasses& passes(bool keys) const {
    return kernels().morphology[static_cast<int>(kind_of(call_.dtype, keys))];
  }

  Chain empty_chain(bool keys) const {
    Chain chain{};
    std::copy(call_.size, call_.size + kSpatialAxes, chain.size);
    chain.row_items = round_up(call_.size[2], passes(keys).lanes);
    chain.border = call_.border;
    chain.border_value = call_.border_value;
    chain.dtype = call_.dtype;
    chain.index_bits = call_.index_bits;
    return chain;
  }

  std::int64_t largest_workspace() const {
    std::int64_t most = 0;
    for (const bool keys : {false, true}) {
      const Chain chain = empty_chain(keys);
      const std::int64_t item = item_bytes(kind_of(call_.dtype, keys)), lanes = passes(keys).lanes;
      for (const std::vector<PlannedTerm>& program : planned_) {
        for (const PlannedTerm& term : program) {
          for (const Step& step : term.steps) {
            most = std::max(
                most, step.element == nullptr
                          ? sweep_workspace_bytes(chain, sweep_of(step), item, lanes)
                          : element_workspace_bytes(chain, element_sweep_of(step), item, lanes));
          }
        }
      }
    }
    return most;
  }

  // One channel of one sample: all its terms.
  void run_channel(std::int64_t channel, char* planes, char* workspaces, int threads) const {
    const std::int64_t at = channel * call_.volume(), item = item_size(call_.dtype);
    const char* input = static_cast<const char*>(call_.input) + at * item;
    char* output = static_cast<char*>(call_.output) + at * item;
    const std::vector<PlannedTerm>& terms =
        planned_[call_.program_of_channel[channel % call_.channels]];
    const std::int64_t index_bytes = call_.index_bits / 8;
    std::int64_t chains = 0;
    for (std::size_t t = 0; t < terms.size(); ++t) {
      const std::int64_t tensor = call_.batch * call_.channels * call_.volume();
      const bool follow = call_.index != nullptr && terms[t].moves;
      char* index = !follow
                        ? nullptr
                        : static_cast<char*>(call_.index) + (chains * tensor + at) * index_bytes;
      chains += terms[t].moves ? 1 : 0;
      const bool keys = follow || (terms[t].moves && has_nan(input, threads));
      Chain chain = empty_chain(keys);
      chain.input = input;
      chain.output = output;
      chain.index = index;
      chain.sign = terms[t].sign;
      chain.add = t > 0;
      run_chain(chain, terms[t].steps, passes(keys), planes, workspaces, threads);
    }
  }

  bool has_nan(const char* input, int threads) const {
    const std::int64_t count = call_.volume(), item = item_size(call_.dtype);
    const std::int64_t piece = round_up((count + threads - 1) / threads, 1024);
    std::atomic<bool> found{false};
    const auto look = [&](std::int64_t i) {
      const std::int64_t begin = std::min(i * piece, count), end = std::min(begin + piece, count);
      if (passes(false).has_nan(input + begin * item, call_.dtype, end - begin)) found = true;
    };
    if (threads == 1) {
      look(0);
    } else {
      parallel_for(threads, threads, look);
    }
    return found;
  }

  void run_chain(const Chain& about, const std::vector<Step>& steps, const MorphologyPasses& passes,
                 char* planes, char* workspaces, int threads) const {
    char* items = planes;
    char* other = planes + plane_bytes_;
    for (std::size_t s = 0; s < steps.size(); ++s) {
      const Step& step = steps[s];
      const bool last = s + 1 == steps.size();
      Chain chain = about;
      chain.items = items;
      chain.input = s == 0 ? about.input : nullptr;
      chain.output = last ? about.output : nullptr;
      chain.index = last ? about.index : nullptr;
      chain.negated = step.negated;
      chain.negated_end = ends_negated(steps);
      ElementSweep element{};
      if (step.element != nullptr) {
        element = element_sweep_of(step);
        element.from = items;
        element.to = other;
        std::swap(items, other);
      }
      const Sweep sweep = sweep_of(step);
      const auto take = [&](std::int64_t begin, std::int64_t end, char* workspace) {
        Chain mine = chain;
        mine.workspace = workspace;
        if (step.element != nullptr) {
          passes.element(mine, element, begin, end);
        } else {
          passes.sweep(mine, sweep, begin, end);
        }
      };
      const std::int64_t lines = step.element != nullptr ? chain.size[0] * chain.size[1]
                                                         : passes.num_lines(chain, step.axis);
      if (threads == 1) {
        take(0, lines, workspaces);
        continue;
      }
      const std::int64_t piece = (lines + threads - 1) / threads;
      parallel_for(threads, threads, [&](std::int64_t i) {
        const std::int64_t begin = std::min(i * piece, lines);
        take(begin, std::min(begin + piece, lines), workspaces + i * workspace_bytes_);
      });
    }
  }

  const Morphology& call_;
  int threads_;
  bool two_planes_ = false;
  std::vector<std::vector<PlannedTerm>> planned_;
  std::int64_t plane_bytes_ = 0, workspace_bytes_ = 0;
};

}  // namespace

void morphology(const Morphology& call, int num_threads) { Call(call, num_threads).run(); }

}  // namespace dpfast::cpu
