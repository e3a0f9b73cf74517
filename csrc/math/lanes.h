// The scalar "lane" operations from which the noise formulae are built.
//
// Every formula in math/ takes an Ops type with these members. ScalarOps serves CUDA and the
// tests; cpu/vector_ops.h has the same members for SIMD vectors. Every operation, the FMA among
// them, is correctly rounded and none is contracted, so that scalar, AVX2, AVX-512 and CUDA
// produce the same bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "math/macros.h"

namespace dpfast::math {

struct ScalarOps {
  using F = float;
  using U = std::uint32_t;

  DPFAST_HOST_DEVICE U u(std::uint32_t x) { return x; }
  DPFAST_HOST_DEVICE F f(float x) { return x; }
  // On the device `a * b` and `a + b` may be contracted to an FMA; the _rn intrinsics never are.
  // Host code is compiled with -ffp-contract=off.
  DPFAST_HOST_DEVICE F mul(F a, F b) {
#if defined(__CUDA_ARCH__)
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
  }
  DPFAST_HOST_DEVICE F add(F a, F b) {
#if defined(__CUDA_ARCH__)
    return __fadd_rn(a, b);
#else
    return a + b;
#endif
  }
  DPFAST_HOST_DEVICE F fma(F a, F b, F c) {
#if defined(__CUDA_ARCH__)
    return __fmaf_rn(a, b, c);
#else
    return std::fma(a, b, c);
#endif
  }
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
  DPFAST_HOST_DEVICE U minimum(U a, U b) { return a < b ? a : b; }
  // Lane by lane, a < b ? yes : no.
  DPFAST_HOST_DEVICE F if_less(U a, U b, F yes, F no) { return a < b ? yes : no; }
  DPFAST_HOST_DEVICE U if_less_u(U a, U b, U yes, U no) { return a < b ? yes : no; }
  DPFAST_HOST_DEVICE F if_bit(U x, std::uint32_t bit, F yes, F no) { return x & bit ? yes : no; }
  DPFAST_HOST_DEVICE bool any_less(U a, std::uint32_t b) { return a < b; }
};

}  // namespace dpfast::math
