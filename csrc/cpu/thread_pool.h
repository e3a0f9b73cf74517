// A small pool of threads, so that no OpenMP runtime is linked beside Torch's own.
#pragma once

#include <cstdint>
#include <functional>

namespace dpfast::cpu {

// Calls task(i) for i in [0, count), each once, on up to num_threads threads (the caller is one).
// Tasks are handed out in increasing order. Blocks until all are done. Safe after fork() and from
// several callers at once (they take turns). task must not throw.
void parallel_for(std::int64_t count, int num_threads,
                  const std::function<void(std::int64_t)>& task);

}  // namespace dpfast::cpu
