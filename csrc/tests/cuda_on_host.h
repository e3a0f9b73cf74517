// Runs the CUDA kernels on the host, one fiber per CUDA thread, so that their logic is tested on
// machines without a GPU. Blocks run one after the other and threads take turns at barriers, in
// both orders: what depends on the order of threads between two barriers shows as a difference.
// Speed, memory coalescing and real concurrency are not tested here.
#pragma once

#define DPFAST_CUDA_ON_HOST 1
// Its longjmp takes a jump to another stack for a mistake.
#undef _FORTIFY_SOURCE

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

// The toolkit's headers leave these empty outside nvcc. Blocks run one at a time, so a block's
// shared memory may be a static variable.
#undef __shared__
#define __shared__ static
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__

namespace dpfast::emulation {

struct Index {
  unsigned x = 0;
};

class Block {
 public:
  Block(int threads, bool backwards) : backwards_(backwards), threads_(threads) {
    for (Thread& thread : threads_) thread.stack.resize(kStackBytes);
  }

  void run(const std::function<void()>& body) {
    current_block = this;
    body_ = &body;
    live_ = static_cast<int>(threads_.size());
    for (Thread& thread : threads_) thread.done = false;
    // A round runs every live thread to its next barrier, in one order or the other.
    while (live_ > 0) {
      for (std::size_t i = 0; i < threads_.size(); ++i) {
        active_ = backwards_ ? threads_.size() - 1 - i : i;
        if (!threads_[active_].done) resume(threads_[active_]);
      }
    }
  }

  // Jumps, for swapcontext asks the kernel for the signal mask every time.
  void yield() {
    if (_setjmp(threads_[active_].place) == 0) _longjmp(main_, 1);
  }
  std::size_t active() const { return active_; }
  double& exchange(std::size_t thread) { return threads_[thread].exchange; }
  double& votes(std::size_t thread, int turn) { return threads_[thread].votes[turn]; }
  int next_turn(std::size_t thread) { return threads_[thread].turn ^= 1; }

  static Block* current_block;

 private:
  static constexpr std::size_t kStackBytes = 64 << 10;

  struct Thread {
    ucontext_t context;
    jmp_buf place;
    std::vector<char> stack;
    bool started = false;
    double exchange = 0.0, votes[2] = {0.0, 0.0};
    int turn = 0;
    bool done = false;
  };

  void resume(Thread& thread) {
    if (_setjmp(main_) != 0) return;
    if (thread.started) _longjmp(thread.place, 1);
    thread.started = true;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = thread.stack.size();
    makecontext(&thread.context, &Block::enter, 0);
    setcontext(&thread.context);
  }

  // A fiber runs its thread of one block after the other.
  static void enter() {
    Block* block = current_block;
    for (;;) {
      (*block->body_)();
      Thread& thread = block->threads_[block->active_];
      thread.done = true;
      thread.turn = 0;
      --block->live_;
      block->yield();
    }
  }

  bool backwards_;
  std::vector<Thread> threads_;
  jmp_buf main_;
  const std::function<void()>* body_ = nullptr;
  std::size_t active_ = 0;
  int live_ = 0;
};

inline Block* Block::current_block = nullptr;
inline Index current_block_index, current_grid;
inline bool backwards = false;
inline std::vector<char> dynamic_shared;
inline int most_shared_bytes = 96 << 10;  // of a block

inline Index thread_index() { return {static_cast<unsigned>(Block::current_block->active())}; }

}  // namespace dpfast::emulation

#define threadIdx (::dpfast::emulation::thread_index())
#define blockIdx (::dpfast::emulation::current_block_index)
#define gridDim (::dpfast::emulation::current_grid)

inline void __syncthreads() { ::dpfast::emulation::Block::current_block->yield(); }

// Two barriers: all lanes have written, then all have read.
inline double __shfl_xor_sync(unsigned, double value, int offset) {
  auto* block = ::dpfast::emulation::Block::current_block;
  const std::size_t me = block->active();
  block->exchange(me) = value;
  block->yield();
  const double other = block->exchange(me ^ static_cast<std::size_t>(offset));
  block->yield();
  return other;
}

// So do a warp's lanes wait for one another: in a kernel that has none of the block's barriers
// between them, each warp may then go its own way.
inline void __syncwarp() { __syncthreads(); }

// Bit l: whether lane l's value satisfies test(value), of values that a double holds.
template <class Test>
unsigned lanes_with(double value, const Test& test) {
  auto* block = ::dpfast::emulation::Block::current_block;
  const std::size_t me = block->active(), first = me / 32 * 32;
  // Two places in turn: a lane that is ahead writes the other one while this is read.
  const int turn = block->next_turn(me);
  block->votes(me, turn) = value;
  block->yield();
  unsigned lanes = 0;
  for (std::size_t lane = 0; lane < 32; ++lane) {
    lanes |= test(block->votes(first + lane, turn)) ? 1u << lane : 0u;
  }
  return lanes;
}

inline unsigned __ballot_sync(unsigned, bool value) {
  return lanes_with(value ? 1.0 : 0.0, [](double other) { return other != 0.0; });
}

inline unsigned __match_any_sync(unsigned, int value) {
  return lanes_with(value, [&](double other) { return other == value; });
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

template <class T>
T atomicAdd(T* address, T value) {
  const T before = *address;
  *address = before + value;
  return before;
}

inline long long __double_as_longlong(double x) {
  long long bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline double __longlong_as_double(long long bits) {
  double x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

namespace dpfast::cuda {

template <class... Parameters, class... Arguments>
void launch(const char*, void (*kernel)(Parameters...), int blocks, int threads, cudaStream_t,
            const Arguments&... arguments) {
  static std::vector<emulation::Block*> cache(2048, nullptr);
  const std::size_t slot = static_cast<std::size_t>(threads) * 2 - (emulation::backwards ? 1 : 2);
  if (cache.size() <= slot) cache.resize(slot + 1, nullptr);
  if (cache[slot] == nullptr) cache[slot] = new emulation::Block(threads, emulation::backwards);
  emulation::current_grid = {static_cast<unsigned>(blocks)};
  for (int b = 0; b < blocks; ++b) {
    emulation::current_block_index = {static_cast<unsigned>(b)};
    cache[slot]->run([&] { kernel(arguments...); });
  }
}

inline char* dynamic_shared() { return emulation::dynamic_shared.data(); }

template <class... Parameters, class... Arguments>
void launch_with_shared(const char* name, void (*kernel)(Parameters...), int blocks, int threads,
                        int shared_bytes, cudaStream_t stream, const Arguments&... arguments) {
  if (shared_bytes > emulation::most_shared_bytes) std::abort();  // a launch would fail
  // Just as large, for tools that watch the heap; what a block finds there is nothing to rely on.
  emulation::dynamic_shared.assign(static_cast<std::size_t>(shared_bytes), '\x5a');
  emulation::dynamic_shared.shrink_to_fit();
  launch(name, kernel, blocks, threads, stream, arguments...);
}

}  // namespace dpfast::cuda

// The parts of the CUDA runtime that the launcher calls.
inline cudaError_t fake_attribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin
               ? dpfast::emulation::most_shared_bytes
               : 2;
  return cudaSuccess;
}
#define cudaDeviceGetAttribute fake_attribute
#define cudaGetDevice(pointer) (*(pointer) = 0, cudaSuccess)
#define cudaSetDevice(device) (static_cast<void>(device), cudaSuccess)
#define cudaGetErrorString(status) (static_cast<void>(status), "")
