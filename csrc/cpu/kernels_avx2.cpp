// The inner loops for AVX2.
#include <immintrin.h>

#include "cpu/kernels.h"

#define DPFAST_ISA_NAME "avx2"
#define DPFAST_VECTOR_BYTES 32

namespace dpfast::cpu {
namespace isa_avx2 {
#include "cpu/kernels_body.inc"
}  // namespace isa_avx2

const Kernels& kernels_avx2() { return isa_avx2::kTable; }
}  // namespace dpfast::cpu
