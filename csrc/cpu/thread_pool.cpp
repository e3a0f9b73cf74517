#include "cpu/thread_pool.h"

#include <pthread.h>
#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

namespace dpfast::cpu {
namespace {

// Waking a sleeping thread takes tens of microseconds. The two passes of a call follow one another
// closely, so that a thread looks out for more work this long before it sleeps.
constexpr auto kSpinTime = std::chrono::microseconds(50);
constexpr int kLooksPerClock = 64;

template <class Condition>
bool spin_until(const Condition& condition) {
  const auto end = std::chrono::steady_clock::now() + kSpinTime;
  do {
    for (int i = 0; i < kLooksPerClock; ++i) {
      if (condition()) return true;
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

class ThreadPool {
 public:
  void run(std::int64_t count, int num_threads, const std::function<void(std::int64_t)>& task) {
    std::lock_guard<std::mutex> one_at_a_time(turn_);
    const int helpers = static_cast<int>(std::min<std::int64_t>(num_threads, count)) - 1;
    std::uint64_t start;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(workers_.size()) < helpers) {
        const int index = static_cast<int>(workers_.size());
        workers_.emplace_back([this, index, seen = round_of(next_.load())] { work(index, seen); });
      }
      // A round of its own in which nothing is to be had, while the next one is set up.
      const std::uint64_t closed = round_of(next_.load()) + 1;
      next_.store((closed << kIndexBits) + kMaxCount);
      task_ = &task;
      count_.store(count);
      helpers_.store(helpers);
      left_.store(count);
      start = (closed + 1) << kIndexBits;
      next_.store(start);
    }
    wake_.notify_all();
    drain(round_of(start));
    // A helper that is slow to wake must not be waited for: the tasks count, not the helpers.
    const auto finished = [this] { return left_.load() == 0; };
    if (spin_until(finished)) return;
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, finished);
  }

 private:
  // next_ holds the round's number above the next task's index, so that whoever comes late to a
  // round cannot take a task of another one.
  static constexpr int kIndexBits = 40;
  static constexpr std::uint64_t kMaxCount = (std::uint64_t{1} << kIndexBits) - 1;
  static std::uint64_t round_of(std::uint64_t next) { return next >> kIndexBits; }
  static std::int64_t index_of(std::uint64_t next) {
    return static_cast<std::int64_t>(next & kMaxCount);
  }

  void drain(std::uint64_t round) {
    std::uint64_t next = next_.load();
    while (round_of(next) == round && index_of(next) < count_.load()) {
      if (!next_.compare_exchange_weak(next, next + 1)) continue;
      // The round cannot end, nor task_ change, before this task is counted as done.
      (*task_)(index_of(next));
      if (left_.fetch_sub(1) == 1) {
        std::lock_guard<std::mutex> lock(mutex_);
        done_.notify_one();
      }
      next = next_.load();
    }
  }

  void work(int index, std::uint64_t seen) {
    const auto called = [&] { return round_of(next_.load()) != seen; };
    for (;;) {
      if (!spin_until(called)) {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, called);
      }
      seen = round_of(next_.load());
      if (index < helpers_.load()) drain(seen);
    }
  }

  std::mutex turn_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  const std::function<void(std::int64_t)>* task_ = nullptr;
  std::atomic<std::uint64_t> next_{0};
  std::atomic<std::int64_t> count_{0}, left_{0};
  std::atomic<int> helpers_{0};
};

// The process' OpenMP, where PyTorch has loaded one. After its parallel regions its threads spin
// for milliseconds: another pool's threads would have to share the cores with them.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

Parallel find_openmp() {
#if defined(__linux__)
  const char* path = nullptr;
  dl_iterate_phdr(
      [](dl_phdr_info* info, std::size_t, void* found) {
        if (std::strstr(info->dlpi_name, "libgomp") == nullptr) return 0;
        *static_cast<const char**>(found) = info->dlpi_name;
        return 1;
      },
      &path);
  void* library = path == nullptr ? nullptr : dlopen(path, RTLD_NOW | RTLD_NOLOAD);
  if (library != nullptr) return reinterpret_cast<Parallel>(dlsym(library, "GOMP_parallel"));
#endif
  return nullptr;
}

struct Shared {
  const std::function<void(std::int64_t)>& task;
  std::int64_t count;
  std::atomic<std::int64_t> next{0};
};

bool run_on_openmp(std::int64_t count, int num_threads,
                   const std::function<void(std::int64_t)>& task) {
  static const Parallel parallel = find_openmp();
  if (parallel == nullptr) return false;
  Shared shared{task, count};
  parallel(
      [](void* data) {
        Shared& mine = *static_cast<Shared*>(data);
        for (std::int64_t i; (i = mine.next.fetch_add(1)) < mine.count;) mine.task(i);
      },
      &shared, static_cast<unsigned>(std::min<std::int64_t>(num_threads, count)), 0);
  return true;
}

// Never destroyed: worker threads may outlive static destruction. A forked child has none of the
// parent's threads, so it starts a new pool and leaves the old one untouched.
std::atomic<ThreadPool*> pool{nullptr};

// OpenMP does not survive a fork either.
std::atomic<bool> forked{false};

// From the moment the library is loaded: PyTorch may have used OpenMP before the fork, and this
// package only after it.
[[maybe_unused]] const int watching_forks = pthread_atfork(nullptr, nullptr, [] {
  forked.store(true);
  pool.store(nullptr);
});

ThreadPool& current_pool() {
  ThreadPool* existing = pool.load();
  if (existing == nullptr) {
    ThreadPool* fresh = new ThreadPool;
    if (pool.compare_exchange_strong(existing, fresh)) return *fresh;
    delete fresh;
  }
  return *existing;
}

}  // namespace

void parallel_for(std::int64_t count, int num_threads,
                  const std::function<void(std::int64_t)>& task) {
  if (num_threads <= 1 || count <= 1) {
    for (std::int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  if (!forked.load() && run_on_openmp(count, num_threads, task)) return;
  current_pool().run(count, num_threads, task);
}

}  // namespace dpfast::cpu
