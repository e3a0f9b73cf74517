// Marks for code that the host compilers and nvcc share.
//
// Everything in math/ is `static` and always inlined on the host: the same header is compiled
// once per instruction set, and an out-of-line copy built for AVX-512 must never be the one that
// the linker hands to the scalar build.
#pragma once

#if defined(__CUDACC__)
#define DPFAST_HOST_DEVICE static __host__ __device__ __forceinline__
#else
#define DPFAST_HOST_DEVICE static inline __attribute__((always_inline))
#endif
