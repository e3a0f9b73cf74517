// The inner loops for any processor (SSE2 on x86-64, NEON on Arm).
#include "cpu/kernels.h"

#define DPFAST_ISA_NAME "baseline"
#define DPFAST_VECTOR_BYTES 16

namespace dpfast::cpu {
namespace isa_baseline {
#include "cpu/kernels_body.inc"
}  // namespace isa_baseline

const Kernels& kernels_baseline() { return isa_baseline::kTable; }
}  // namespace dpfast::cpu
