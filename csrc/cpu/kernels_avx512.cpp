// The inner loops for AVX512.
#include <immintrin.h>

#include "cpu/kernels.h"

#define DPFAST_ISA_NAME "avx512"
#define DPFAST_VECTOR_BYTES 64

namespace dpfast::cpu {
namespace isa_avx512 {
#include "cpu/kernels_body.inc"
}  // namespace isa_avx512

const Kernels& kernels_avx512() { return isa_avx512::kTable; }
}  // namespace dpfast::cpu
