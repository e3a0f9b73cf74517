// SIMD lanes in the compiler's vector extension: one source for SSE2, AVX2, AVX-512 and NEON.
//
// Include it inside the namespace of one instruction set only (kernels_body.inc does).
struct VectorOps {
  static constexpr int kWidth = DPFAST_VECTOR_BYTES / 4;
  typedef float F __attribute__((vector_size(DPFAST_VECTOR_BYTES)));
  typedef std::uint32_t U __attribute__((vector_size(DPFAST_VECTOR_BYTES)));
  typedef std::int32_t S __attribute__((vector_size(DPFAST_VECTOR_BYTES)));

  DPFAST_HOST_DEVICE U u(std::uint32_t x) { return U{} + x; }
  DPFAST_HOST_DEVICE F f(float x) { return F{} + x; }
  DPFAST_HOST_DEVICE F mul(F a, F b) { return a * b; }
  DPFAST_HOST_DEVICE F add(F a, F b) { return a + b; }
  DPFAST_HOST_DEVICE F to_float(U x) { return __builtin_convertvector(x, F); }
  DPFAST_HOST_DEVICE F signed_to_float(U x) { return __builtin_convertvector((S)x, F); }
  DPFAST_HOST_DEVICE F as_float(U x) { return (F)x; }
  DPFAST_HOST_DEVICE U as_uint(F x) { return (U)x; }
  DPFAST_HOST_DEVICE U arithmetic_shift_right(U x, int n) { return (U)((S)x >> n); }
  DPFAST_HOST_DEVICE F sqrt(F x) {
    F y;
    for (int i = 0; i < kWidth; ++i) y[i] = __builtin_sqrtf(x[i]);
    return y;
  }
  DPFAST_HOST_DEVICE U less(U a, U b) { return (U)(a < b); }
  DPFAST_HOST_DEVICE F select(U mask, F yes, F no) { return (S)mask ? yes : no; }
  DPFAST_HOST_DEVICE U select_u(U mask, U yes, U no) { return (S)mask ? yes : no; }
  DPFAST_HOST_DEVICE bool any(U mask) {
    std::uint32_t all = 0;
    for (int i = 0; i < kWidth; ++i) all |= mask[i];
    return all != 0;
  }
};
