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
  DPFAST_HOST_DEVICE U minimum(U a, U b) { return a < b ? a : b; }
  DPFAST_HOST_DEVICE F if_less(U a, U b, F yes, F no) { return a < b ? yes : no; }
  DPFAST_HOST_DEVICE U if_less_u(U a, U b, U yes, U no) { return a < b ? yes : no; }
  DPFAST_HOST_DEVICE F if_bit(U x, std::uint32_t bit, F yes, F no) {
    return (x & bit) != 0 ? yes : no;
  }
  DPFAST_HOST_DEVICE F fma(F a, F b, F c) {
#if DPFAST_VECTOR_BYTES == 64
    return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif DPFAST_VECTOR_BYTES == 32
    return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    F y;
    for (int i = 0; i < kWidth; ++i) y[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return y;
#endif
  }
  DPFAST_HOST_DEVICE bool any_less(U a, std::uint32_t b) {
#if DPFAST_VECTOR_BYTES == 64
    return _mm512_cmplt_epu32_mask((__m512i)a, _mm512_set1_epi32(static_cast<int>(b))) != 0;
#else
    const S below = a < U{} + b;
    std::int32_t any = 0;
    for (int i = 0; i < kWidth; ++i) any |= below[i];
    return any != 0;
#endif
  }
};
