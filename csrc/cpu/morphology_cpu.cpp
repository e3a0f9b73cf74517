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

// The chain's boxes where rows can stream through all of them at once, else none.
std::vector<StreamBox> plan_stream(const MorphologyTerm& term, const Morphology& call) {
  std::vector<StreamBox> boxes;
  const bool wrap = call.border == Border::kWrap;  // the first row needs the last one
  if (wrap || term.stages.size() > kStreamBoxes) return boxes;
  bool dilate = true;
  for (const MorphologyStage& stage : term.stages) {
    bool small = stage.kind == ElementKind::kBox;
    for (int axis = 0; axis < kSpatialAxes; ++axis) {
      small &= stage.high[axis] - stage.low[axis] < kStreamWindow;
    }
    if (!small || (call.size[0] == 1 && stage.low[0] != stage.high[0])) return {};
    boxes.push_back({stage.low, stage.high, !boxes.empty() && stage.dilate != dilate});
    dilate = stage.dilate;
  }
  return boxes;
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

// Keys that are ready for everything, or values.
ItemKind kind_of(DType dtype, bool keys) {
  if (dtype == DType::kFloat64) return keys ? ItemKind::kDoubleKey : ItemKind::kDouble;
  return keys ? ItemKind::kSingleKey : ItemKind::kSingle;
}

// One program's term, planned once for all channels that it is for.
struct PlannedTerm {
  int sign;
  bool moves;  // or is the input itself
  std::vector<Step> steps;
  std::vector<StreamBox> boxes;  // instead of the steps, where there are any

  Stream stream() const { return {boxes.data(), static_cast<int>(boxes.size())}; }
};

class Call {
 public:
  Call(const Morphology& call, int num_threads)
      : call_(call),
        source_(math::source_index(call)),
        channels_(call.batch * call.channels),
        threads_(num_threads),
        together_(threads_ > 1 && channels_ < 4 * threads_ && call.volume() >= kLargeChannel) {
    for (const MorphologyProgram& program : call.programs) {
      std::vector<PlannedTerm> terms;
      for (const MorphologyTerm& term : program) {
        terms.push_back({term.sign, !term.stages.empty(), plan(term), plan_stream(term, call)});
        if (!stream_shares(terms.back())) terms.back().boxes.clear();
        if (!terms.back().boxes.empty()) continue;
        planes_ = std::max(planes_, 1);
        for (const Step& step : terms.back().steps) {
          if (step.element != nullptr) planes_ = 2;
        }
      }
      planned_.push_back(std::move(terms));
    }
  }

  void run() {
    if (channels_ == 0 || call_.volume() == 0) return;
    const std::int64_t item = item_bytes(kind_of(call_.dtype, true));  // the larger ones
    plane_bytes_ = round_up(call_.size[2], most_lanes()) * call_.size[0] * call_.size[1] * item;
    plane_bytes_ = round_up(plane_bytes_ + kAlignment, kAlignment);
    workspace_bytes_ = round_up(largest_workspace(), kAlignment);
    // Channels side by side; or, where they are few and large, one after the other by all threads.
    const std::int64_t workers = std::min<std::int64_t>(threads_, together_ ? threads_ : channels_);
    const std::int64_t plane_sets = together_ ? 1 : workers;
    const Memory memory =
        allocate(plane_sets * planes_ * plane_bytes_ + workers * workspace_bytes_);
    char* workspaces = memory.get() + plane_sets * planes_ * plane_bytes_;
    if (together_) {
      for (std::int64_t c = 0; c < channels_; ++c) {
        run_channel(c, c + 1, memory.get(), workspaces, static_cast<int>(workers));
      }
      return;
    }
    std::atomic<std::int64_t> next{0};
    parallel_for(workers, threads_, [&](std::int64_t worker) {
      std::int64_t after = next++;
      for (std::int64_t c = after; c < channels_; c = after) {
        after = next++;
        run_channel(c, std::min(after, channels_), memory.get() + worker * planes_ * plane_bytes_,
                    workspaces + worker * workspace_bytes_, 1);
      }
    });
  }

 private:
  static std::int64_t round_up(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }

  std::int64_t most_lanes() const {
    std::int64_t lanes = 1;
    for (const bool keys : {false, true}) {
      lanes = std::max(lanes, passes(kind_of(call_.dtype, keys)).lanes);
    }
    return lanes;
  }

  static const MorphologyPasses& passes(ItemKind kind) {
    return kernels().morphology[static_cast<int>(kind)];
  }

  Chain empty_chain(ItemKind kind) const {
    Chain chain{};
    std::copy(call_.size, call_.size + kSpatialAxes, chain.size);
    chain.row_items = round_up(call_.size[2], passes(kind).lanes);
    chain.border = call_.border;
    chain.border_value = call_.border_value;
    chain.dtype = call_.dtype;
    chain.index_bits = call_.index_bits;
    chain.source = source_;
    return chain;
  }

  // The axis along which threads share a channel.
  int slow_axis() const { return call_.size[0] > 1 ? 0 : 1; }

  // Whether it costs little that each thread takes what windows reach beyond its share as well.
  bool stream_shares(const PlannedTerm& term) const {
    std::int64_t reach = 0;
    for (const StreamBox& box : term.boxes) reach += box.high[slow_axis()] - box.low[slow_axis()];
    return !together_ || call_.size[slow_axis()] >= 4 * reach * threads_;
  }

  std::int64_t largest_workspace() const {
    std::int64_t most = 0;
    for (const bool keys : {false, true}) {
      const ItemKind kind = kind_of(call_.dtype, keys);
      const Chain chain = empty_chain(kind);
      const std::int64_t item = item_bytes(kind), lanes = passes(kind).lanes;
      for (const std::vector<PlannedTerm>& program : planned_) {
        for (const PlannedTerm& term : program) {
          if (!term.boxes.empty()) {
            most = std::max(most, stream_workspace_bytes(chain, term.stream(), item, lanes));
            continue;
          }
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
    const std::int64_t tensor = channels_ * call_.volume();
    const bool large = tensor * item >= kLargeTensor;
    std::int64_t chains = 0;
    bool maybe_nan = false;
    for (std::size_t t = 0; t < terms.size(); ++t) {
      const bool follow = call_.index != nullptr && terms[t].moves;
      char* index = !follow
                        ? nullptr
                        : static_cast<char*>(call_.index) + (chains * tensor + at) * index_bytes;
      chains += terms[t].moves ? 1 : 0;
      // The first term has seen all of the input: the others, whose results are added to what is
      // there and could not be taken back, know about its NaN. Careful keys do not look for one.
      const ItemKind careful = kind_of(call_.dtype, true);
      ItemKind kind = kind_of(call_.dtype, follow);
      if (kind == ItemKind::kSingleKey && !terms[t].boxes.empty()) kind = ItemKind::kCleanKey;
      if (maybe_nan && terms[t].moves) kind = careful;
      for (;; kind = careful) {
        Chain chain = empty_chain(kind);
        chain.input = input;
        chain.output = output;
        chain.index = index;
        chain.sign = terms[t].sign;
        chain.add = t > 0;
        chain.around_caches = large;
        if (t + 1 == terms.size() && after < channels_) {
          chain.ask = static_cast<const char*>(call_.input) + after * call_.volume() * item;
          chain.ask_bytes = large ? call_.volume() * item : 0;
        }
        const bool found = run_chain(chain, terms[t], kind, planes, workspaces, threads);
        maybe_nan |= found || kind == careful;
        if (!maybe_nan || !terms[t].moves || kind == careful) break;
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

  // Whether a NaN was read that needs careful keys. It may stop early then.
  bool run_chain(const Chain& about, const PlannedTerm& term, ItemKind kind, char* planes,
                 char* workspaces, int threads) const {
    const std::vector<Step>& steps = term.steps;
    std::atomic<bool> found_nan{false};
    if (!term.boxes.empty()) {
      const std::int64_t lines = call_.size[slow_axis()];
      share(lines, threads, workspaces, [&](std::int64_t begin, std::int64_t end, char* mine) {
        Chain chain = about;
        chain.workspace = mine;
        chain.negated = steps.front().negated;
        chain.negated_end = chain.negated;
        for (const StreamBox& box : term.boxes) {
          chain.negated_end = chain.negated_end != box.negate_before;
        }
        if (passes(kind).stream(chain, term.stream(), begin, end)) found_nan = true;
      });
      return found_nan;
    }
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
          if (run_step(chain, steps[s], passes(kind), begin, end, parts, other)) found_nan = true;
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
        const std::int64_t lines = num_lines(about, steps[group.first], passes(kind));
        share(lines, threads, workspaces, [&](std::int64_t begin, std::int64_t end, char* mine) {
          take(begin, end, lines, mine);
        });
      }
      if (found_nan && term.moves) break;
    }
    return found_nan;
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
  const std::int64_t channels_;
  const int threads_;
  const bool together_;
  int planes_ = 0;  // of items that a thread works on
  std::vector<std::vector<PlannedTerm>> planned_;
  std::int64_t plane_bytes_ = 0, workspace_bytes_ = 0;
};

}  // namespace

void morphology(const Morphology& call, int num_threads) { Call(call, num_threads).run(); }

}  // namespace dpfast::cpu
