// Host versions of cuda/tensor_cores.cuh, for fibers: asynchronous copies that arrive only when
// they are waited for, and products of fragments in the layout that the hardware has.
#pragma once

#include <cstdlib>
#include <type_traits>

#include "tests/cuda_on_host.h"

namespace dpfast::emulation {

struct PendingCopy {
  void* to;
  char bytes[16];
  int count;
};

inline std::vector<PendingCopy>& pending_copies() {
  static std::vector<std::vector<PendingCopy>> of_thread(1024);
  return of_thread[Block::current_block->active()];
}

// What tensor cores see of a word: float32 without the bits that TF32 lacks, or two 16-bit values.
template <class T>
double multiply_words(std::uint32_t a, std::uint32_t b) {
  if constexpr (sizeof(T) == 4) {
    float x, y;
    a &= ~0x1fffu;
    b &= ~0x1fffu;
    std::memcpy(&x, &a, 4);
    std::memcpy(&y, &b, 4);
    return static_cast<double>(x) * static_cast<double>(y);
  } else {
    T x[2], y[2];
    std::memcpy(static_cast<void*>(x), &a, 4);
    std::memcpy(static_cast<void*>(y), &b, 4);
    return static_cast<double>(static_cast<float>(x[0])) * static_cast<float>(y[0]) +
           static_cast<double>(static_cast<float>(x[1])) * static_cast<float>(y[1]);
  }
}

struct Operands {
  const std::uint32_t *a, *b;
};

inline Operands& operands_of(std::size_t thread) {
  static std::vector<Operands> of_thread(1024);
  return of_thread[thread];
}

}  // namespace dpfast::emulation

namespace dpfast::cuda {

template <int kBytes>
void copy_async(void* to, const void* from, bool inside) {
  emulation::PendingCopy copy{to, {}, kBytes};
  if (reinterpret_cast<std::uintptr_t>(to) % kBytes != 0 ||
      (inside && reinterpret_cast<std::uintptr_t>(from) % kBytes != 0)) {
    std::abort();  // the hardware would stop, too
  }
  if (inside) std::memcpy(copy.bytes, from, kBytes);
  emulation::pending_copies().push_back(copy);
}

inline void wait_for_copies() {
  for (const emulation::PendingCopy& copy : emulation::pending_copies()) {
    std::memcpy(copy.to, copy.bytes, static_cast<std::size_t>(copy.count));
  }
  emulation::pending_copies().clear();
}

template <class T>
std::uint32_t fragment_word(std::uint32_t word) {
  // Adding half of the last kept place carries into it: to nearest, ties away from zero.
  return sizeof(T) == 4 ? (word + 0x1000u) & ~0x1fffu : word;
}

// All lanes of a warp show their registers, then each takes from the others what its sums need.
template <class T, int kRows, int kColumns>
void multiply_fragments(float (&sums)[kRows][kColumns][4], const std::uint32_t (&a)[kRows][4],
                        const std::uint32_t (&b)[kColumns][2]) {
  emulation::Block* block = emulation::Block::current_block;
  const std::size_t me = block->active(), warp = me / 32 * 32;
  const int group = static_cast<int>(me % 32) / 4, member = static_cast<int>(me % 4);
  emulation::operands_of(me) = {&a[0][0], &b[0][0]};
  block->yield();
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kColumns; ++j) {
      for (int r = 0; r < 4; ++r) {
        const int row = group + 8 * (r / 2), column = 2 * member + r % 2;
        double sum = sums[i][j][r];
        for (int word = 0; word < 8; ++word) {
          const std::size_t a_lane = warp + static_cast<std::size_t>(row % 8 * 4 + word % 4);
          const std::size_t b_lane = warp + static_cast<std::size_t>(column * 4 + word % 4);
          sum += emulation::multiply_words<T>(
              emulation::operands_of(a_lane).a[i * 4 + row / 8 + word / 4 * 2],
              emulation::operands_of(b_lane).b[j * 2 + word / 4]);
        }
        sums[i][j][r] = static_cast<float>(sum);
      }
    }
  }
  block->yield();
}

}  // namespace dpfast::cuda
