#include "cpu/thread_pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace dpfast::cpu {
namespace {

class ThreadPool {
 public:
  void run(std::int64_t count, int num_threads, const std::function<void(std::int64_t)>& task) {
    std::lock_guard<std::mutex> one_at_a_time(turn_);
    const int helpers = static_cast<int>(std::min<std::int64_t>(num_threads, count)) - 1;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(workers_.size()) < helpers) {
        const int index = static_cast<int>(workers_.size());
        workers_.emplace_back([this, index, seen = generation_] { work(index, seen); });
      }
      task_ = &task;
      count_ = count;
      next_.store(0, std::memory_order_relaxed);
      helpers_ = helpers;
      running_ = helpers;
      ++generation_;
    }
    wake_.notify_all();
    drain();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
  }

 private:
  void drain() {
    for (std::int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) {
      (*task_)(i);
    }
  }

  void work(int index, std::uint64_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      if (index >= helpers_) continue;
      lock.unlock();
      drain();
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex turn_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  const std::function<void(std::int64_t)>* task_ = nullptr;
  std::atomic<std::int64_t> next_{0};
  std::int64_t count_ = 0;
  int helpers_ = 0;
  int running_ = 0;
  std::uint64_t generation_ = 0;
};

// Never destroyed: worker threads may outlive static destruction. A forked child has none of the
// parent's threads, so it starts a new pool and leaves the old one untouched.
std::atomic<ThreadPool*> pool{nullptr};

ThreadPool& current_pool() {
  static const int registered =
      pthread_atfork(nullptr, nullptr, [] { pool.store(new ThreadPool); });
  (void)registered;
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
  current_pool().run(count, num_threads, task);
}

}  // namespace dpfast::cpu
