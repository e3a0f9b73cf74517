// The scalar "lane" operations from which the noise formulae are built.
//
// Every formula in math/ takes an Ops type with these members. ScalarOps serves CUDA and the
// tests; cpu/vector_ops.h has the same members for SIMD vectors. Multiplication and addition are
// separate and correctly rounded everywhere (no contraction to FMA), so that scalar, AVX2,
// AVX-512 and CUDA produce the same bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "math/macros.h"

namespace dpfast::math {

// On the device, `a * b + c` may be contracted; the _rn intrinsics never are.
DPFAST_HOST_DEVICE float mul_rounded(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;  // host code is compiled with -ffp-contract=off
#endif
}

DPFAST_HOST_DEVICE float add_rounded(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

struct ScalarOps {
  using F = float;
  using U = std::uint32_t;

  DPFAST_HOST_DEVICE U u(std::uint32_t x) { return x; }
  DPFAST_HOST_DEVICE F f(float x) { return x; }
  DPFAST_HOST_DEVICE F mul(F a, F b) { return mul_rounded(a, b); }
  DPFAST_HOST_DEVICE F add(F a, F b) { return add_rounded(a, b); }
  DPFAST_HOST_DEVICE F to_float(U x) {
#if defined(__CUDA_ARCH__)
    return __uint2float_rn(x);
#else
    return static_cast<float>(x);
#endif
  }
  DPFAST_HOST_DEVICE F signed_to_float(U x) {
#if defined(__CUDA_ARCH__)
    return __int2float_rn(static_cast<std::int32_t>(x));
#else
    return static_cast<float>(static_cast<std::int32_t>(x));
#endif
  }
  DPFAST_HOST_DEVICE F as_float(U x) {
#if defined(__CUDA_ARCH__)
    return __uint_as_float(x);
#else
    float y;
    std::memcpy(&y, &x, sizeof y);
    return y;
#endif
  }
  DPFAST_HOST_DEVICE U as_uint(F x) {
#if defined(__CUDA_ARCH__)
    return __float_as_uint(x);
#else
    std::uint32_t y;
    std::memcpy(&y, &x, sizeof y);
    return y;
#endif
  }
  DPFAST_HOST_DEVICE U arithmetic_shift_right(U x, int n) {
    return static_cast<U>(static_cast<std::int32_t>(x) >> n);
  }
  DPFAST_HOST_DEVICE F sqrt(F x) {
#if defined(__CUDA_ARCH__)
    return __fsqrt_rn(x);
#else
    return std::sqrt(x);
#endif
  }
  DPFAST_HOST_DEVICE U less(U a, U b) { return a < b ? ~0u : 0u; }  // a mask of all ones
  DPFAST_HOST_DEVICE F select(U mask, F yes, F no) { return mask ? yes : no; }
  DPFAST_HOST_DEVICE U select_u(U mask, U yes, U no) { return mask ? yes : no; }
  DPFAST_HOST_DEVICE bool any(U mask) { return mask != 0; }
};

}  // namespace dpfast::math
