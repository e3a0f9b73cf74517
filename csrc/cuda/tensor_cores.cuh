// The instructions of sm_80 that conv_grad is built on: tensor cores and copies that bypass
// registers. The host emulation of csrc/tests has its own version.
//
// A fragment word is 32 bits of a row: one float32, or two neighbouring 16-bit values. In these
// units all three products are 16 x 8 words times 8 x 8 words, with the same layout over a warp's
// lanes (PTX ISA, mma.m16n8k8 for .tf32 and mma.m16n8k16 for .bf16 and .f16). With
// lane = 4 * group + member:
//   first operand    [16 rows][8 words]   register r: row group + 8 * (r % 2), word member + 4 * (r
//   / 2) second operand   [8 columns][8 words] register r: column group, word member + 4 * r sums
//   [16 rows][8 columns] register r: row group + 8 * (r / 2), column 2 * member + r % 2
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace dpfast::cuda {

constexpr int kMmaRows = 16;
constexpr int kMmaColumns = 8;
constexpr int kMmaWords = 8;

#if !defined(DPFAST_CUDA_ON_HOST)
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define DPFAST_SM80 1
#else
#define DPFAST_SM80 0
#endif

// Copies kBytes (4 or 16, both addresses aligned to it) to shared memory, or zeros where `inside`
// is false; the source is not touched then. Visible to this thread after wait_for_copies().
template <int kBytes>
__device__ inline void copy_async(void* to, const void* from, bool inside) {
  static_assert(kBytes == 4 || kBytes == 16, "what cp.async can do");
#if DPFAST_SM80
  const std::uint32_t target = static_cast<std::uint32_t>(__cvta_generic_to_shared(to));
  const int bytes = inside ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(from),
                 "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(target), "l"(from), "r"(bytes)
                 : "memory");
  }
#else
  for (int i = 0; i < kBytes / 4; ++i) {
    static_cast<std::uint32_t*>(to)[i] = inside ? static_cast<const std::uint32_t*>(from)[i] : 0u;
  }
#endif
}

__device__ inline void wait_for_copies() {
#if DPFAST_SM80
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// A word as tensor cores take it: float32 is rounded to TF32's 10 bits (ties away from zero),
// which would be cut off otherwise.
template <class T>
__device__ inline std::uint32_t fragment_word(std::uint32_t word) {
  if constexpr (sizeof(T) == 4) {
#if DPFAST_SM80
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(word) : "f"(__uint_as_float(word)));
#endif
  }
  return word;
}

#define DPFAST_MMA(kind)                                             \
  asm("mma.sync.aligned." kind                                       \
      " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, " \
      "%3};"                                                         \
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])   \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

template <class T>
__device__ inline void multiply_fragment(float (&sums)[4], const std::uint32_t (&a)[4],
                                         const std::uint32_t (&b)[2]) {
#if DPFAST_SM80
  if constexpr (sizeof(T) == 4) {
    DPFAST_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    DPFAST_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
  } else {
    DPFAST_MMA("m16n8k16.row.col.f32.f16.f16.f32");
  }
#else
  __trap();  // dpfast/ops/conv_grad_sample.py keeps older devices away
#endif
}
#undef DPFAST_MMA

// sums += a * b for a warp's fragments, each of them with every other.
template <class T, int kRows, int kColumns>
__device__ inline void multiply_fragments(float (&sums)[kRows][kColumns][4],
                                          const std::uint32_t (&a)[kRows][4],
                                          const std::uint32_t (&b)[kColumns][2]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) multiply_fragment<T>(sums[i][j], a[i], b[j]);
  }
}
#undef DPFAST_SM80
#endif

}  // namespace dpfast::cuda
