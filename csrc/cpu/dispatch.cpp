// Picks the instruction set once, when the module first asks.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

namespace dpfast::cpu {
namespace {

#if defined(DPFAST_X86_KERNELS)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

const Kernels& choose() {
  const char* forced = std::getenv("DPFAST_FORCE_ISA");
  const std::string name = forced == nullptr ? "" : forced;
  if (name == "baseline") return kernels_baseline();
#if defined(DPFAST_X86_KERNELS)
  __builtin_cpu_init();
  if (name == "avx2" && has_avx2()) return kernels_avx2();
  if (name == "avx512" && has_avx512()) return kernels_avx512();
  if (name.empty()) {
    if (has_avx512()) return kernels_avx512();
    if (has_avx2()) return kernels_avx2();
  }
#endif
  if (name.empty()) return kernels_baseline();
  throw std::runtime_error(
      "dpfast: DPFAST_FORCE_ISA must be baseline, avx2 or avx512 and supported by this "
      "processor, got \"" +
      name + "\"");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace dpfast::cpu
