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
// Above this many bytes a tensor is in no cache when it is read again.
constexpr std::int64_t kLargeTensor = 8 << 20;

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

// The sweeps of a chain. The first one reads the input, along rows, and the last one writes the
// output, along rows again: written column by column, memory would wait for every line.
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
  if (steps.back().element != nullptr || steps.back().axis != 2) {
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
  Call(const Morphology& call, int num_threads)
      : call_(call), source_(math::source_index(call)), threads_(num_threads) {
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
        run_channel(c, c + 1, memory.get(), workspaces, static_cast<int>(workers));
      }
      return;
    }
    std::atomic<std::int64_t> next{0};
    parallel_for(workers, threads_, [&](std::int64_t worker) {
      std::int64_t after = next++;
      for (std::int64_t c = after; c < channels; c = after) {
        after = next++;
        run_channel(c, std::min(after, channels), memory.get() + worker * planes * plane_bytes_,
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
    chain.source = source_;
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

  // One channel of one sample: all its terms. The thread turns to channel `after` then.
  void run_channel(std::int64_t channel, std::int64_t after, char* planes, char* workspaces,
                   int threads) const {
    const std::int64_t at = channel * call_.volume(), item = item_size(call_.dtype);
    const char* input = static_cast<const char*>(call_.input) + at * item;
    char* output = static_cast<char*>(call_.output) + at * item;
    const std::vector<PlannedTerm>& terms =
        planned_[call_.program_of_channel[channel % call_.channels]];
    const std::int64_t index_bytes = call_.index_bits / 8;
    const bool large = call_.batch * call_.channels * call_.volume() * item >= kLargeTensor;
    std::int64_t chains = 0;
    for (std::size_t t = 0; t < terms.size(); ++t) {
      const std::int64_t tensor = call_.batch * call_.channels * call_.volume();
      const bool follow = call_.index != nullptr && terms[t].moves;
      char* index = !follow
                        ? nullptr
                        : static_cast<char*>(call_.index) + (chains * tensor + at) * index_bytes;
      chains += terms[t].moves ? 1 : 0;
      Chain chain{};
      // What is added to the output cannot be taken back when a NaN turns up.
      const bool once = t > 0 && terms[t].moves && groups_of(terms[t].steps).size() == 1;
      for (bool keys = follow || once;; keys = true) {
        chain = empty_chain(keys);
        chain.input = input;
        chain.output = output;
        chain.index = index;
        chain.sign = terms[t].sign;
        chain.add = t > 0;
        chain.around_caches = large;
        if (t + 1 == terms.size() && after < call_.batch * call_.channels) {
          chain.ask = static_cast<const char*>(call_.input) + after * call_.volume() * item;
          chain.ask_bytes = large ? call_.volume() * item : 0;
        }
        if (run_chain(chain, terms[t], keys, planes, workspaces, threads)) break;
      }
    }
  }

  // Sweeps that are taken together, slice by slice: [first, last).
  struct Group {
    std::size_t first, last;
    bool by_slice;
  };

  // In 3D, neighbouring sweeps within slices, which stay in the cache meanwhile.
  std::vector<Group> groups_of(const std::vector<Step>& steps) const {
    std::vector<Group> groups;
    for (std::size_t s = 0; s < steps.size(); ++s) {
      const bool by_slice = call_.size[0] > 1 && steps[s].element == nullptr && steps[s].axis != 0;
      if (by_slice && !groups.empty() && groups.back().by_slice) {
        groups.back().last = s + 1;
      } else {
        groups.push_back({s, s + 1, by_slice});
      }
    }
    return groups;
  }

  // False where it stopped early, having found a NaN that needs keys.
  bool run_chain(const Chain& about, const PlannedTerm& term, bool keys, char* planes,
                 char* workspaces, int threads) const {
    const std::vector<Step>& steps = term.steps;
    std::atomic<bool> found_nan{false};
    char* items = planes;
    char* other = planes + plane_bytes_;
    for (const Group& group : groups_of(steps)) {
      if (steps[group.first].element != nullptr) std::swap(items, other);
      // Parts [begin, end) of `parts` equal ones of each sweep.
      const auto take = [&](std::int64_t begin, std::int64_t end, std::int64_t parts,
                            char* workspace) {
        for (std::size_t s = group.first; s < group.last; ++s) {
          Chain chain = about;
          chain.items = items;
          chain.workspace = workspace;
          if (s > 0) chain.input = nullptr;
          if (s + 1 < steps.size()) chain.output = chain.index = nullptr;
          chain.negated = steps[s].negated;
          chain.negated_end = ends_negated(steps);
          if (run_step(chain, steps[s], passes(keys), begin, end, parts, other)) found_nan = true;
        }
      };
      if (group.by_slice) {
        const std::int64_t slices = call_.size[0];
        share(slices, threads, workspaces, [&](std::int64_t begin, std::int64_t end, char* mine) {
          for (std::int64_t slice = begin; slice < end; ++slice) {
            take(slice, slice + 1, slices, mine);
          }
        });
      } else {
        const std::int64_t lines = num_lines(about, steps[group.first], passes(keys));
        share(lines, threads, workspaces, [&](std::int64_t begin, std::int64_t end, char* mine) {
          take(begin, end, lines, mine);
        });
      }
      if (found_nan && !keys && term.moves) return false;
    }
    return true;
  }

  static std::int64_t num_lines(const Chain& chain, const Step& step,
                                const MorphologyPasses& passes) {
    if (step.element != nullptr) return chain.size[0] * chain.size[1];
    return passes.num_lines(chain, step.axis);
  }

  // Whether a NaN was read that the items do not handle.
  static bool run_step(const Chain& chain, const Step& step, const MorphologyPasses& passes,
                       std::int64_t begin, std::int64_t end, std::int64_t parts, const char* from) {
    const std::int64_t each = num_lines(chain, step, passes) / parts;
    if (step.element == nullptr) {
      return passes.sweep(chain, sweep_of(step), begin * each, end * each);
    }
    ElementSweep element = element_sweep_of(step);
    element.from = from;
    element.to = chain.items;
    passes.element(chain, element, begin * each, end * each);
    return false;
  }

  // task(begin, end, workspace) over [0, count), in as many pieces as there are threads.
  template <class Task>
  void share(std::int64_t count, int threads, char* workspaces, const Task& task) const {
    if (threads == 1) {
      task(0, count, workspaces);
      return;
    }
    const std::int64_t piece = (count + threads - 1) / threads;
    parallel_for(threads, threads, [&](std::int64_t i) {
      const std::int64_t begin = std::min(i * piece, count);
      task(begin, std::min(begin + piece, count), workspaces + i * workspace_bytes_);
    });
  }

  const Morphology& call_;
  const SourceIndex source_;
  int threads_;
  bool two_planes_ = false;
  std::vector<std::vector<PlannedTerm>> planned_;
  std::int64_t plane_bytes_ = 0, workspace_bytes_ = 0;
};

}  // namespace

void morphology(const Morphology& call, int num_threads) { Call(call, num_threads).run(); }

}  // namespace dpfast::cpu
