// Clipping weights, their safety margin and the noise scales: one home for CPU and CUDA.
//
// A unit of norm n contributes weight(n) * gradient with n * weight(n) <= bound, and weight
// depends on nothing but the unit's own norm: that makes `bound` the sensitivity.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "math/macros.h"

namespace dpfast::math {

enum class Clipping : int {
  kNone = 0,        // 1: no bound
  kFlat = 1,        // min(1, C / n)                 Abadi et al. 2016, arXiv:1607.00133
  kAutomatic = 2,   // C / (n + gamma)               AUTO-S, Bu et al. 2022, arXiv:2206.07136
  kAutoV = 3,       // C / n, 0 at n = 0             AUTO-V, the same
  kNormalized = 4,  // 1 / (n + r), C = 1            NSGD, Yang et al. 2022, arXiv:2206.13033
  kPsac = 5,        // C / (n + r / (n + r))         Xia et al. 2022, arXiv:2212.00328
  kCustom = 6       // the caller's weight, cut to C / n
};

// Relative slack between the bound and what is aimed at. The norm is a float64 sum of P <= 2^36
// non-negative terms: at most 2^12 of them are added in sequence within a chunk and 2^24 partial
// sums across chunks, so its relative error is below 2^-28 (sum) and 2^-29 (root); the weight
// adds a few 2^-53. 2^-28 covers both with half to spare. Norms that the caller took in float32
// are trusted to 2^-20.
constexpr double kNormMargin = 0x1p-28;
constexpr double kGivenSingleNormMargin = 0x1p-20;

// Below this a squared norm is subnormal and its relative error is no longer bounded. Such a
// norm is taken as 0; the rules that divide by it are bounded because gamma, r >= 1e-30.
constexpr double kTinyNorm = 0x1p-500;

// A subnormal weight has lost its relative precision: rounded up, it could exceed the bound
// twofold. It is cut to 0.
DPFAST_HOST_DEVICE double normal_or_zero(double weight) {
  return std::fabs(weight) < 2.2250738585072014e-308 ? 0.0 : weight;
}

DPFAST_HOST_DEVICE double rule_weight(Clipping rule, double norm, double bound, double stability,
                                      double custom) {
  const double n = norm < kTinyNorm ? 0.0 : norm;
  switch (rule) {
    case Clipping::kNone:
      return 1.0;
    case Clipping::kFlat:
      return n <= bound ? 1.0 : bound / n;
    case Clipping::kAutomatic:
    case Clipping::kNormalized:
      return bound / (n + stability);
    case Clipping::kAutoV:
      return n == 0.0 ? 0.0 : bound / n;
    case Clipping::kPsac:
      return bound / (n + stability / (n + stability));
    case Clipping::kCustom: {
      const double size = std::fabs(custom);
      if (!(size <= 1.7976931348623157e308)) return 0.0;
      // A tiny norm is not known to relative precision; kTinyNorm bounds it from above.
      const double ceiling = bound / (norm < kTinyNorm ? kTinyNorm : norm);
      return size <= ceiling ? custom : (custom < 0.0 ? -ceiling : ceiling);
    }
  }
  return 0.0;
}

// What multiplies the sum of a unit's rows. averaged_rows: their number where the unit's gradient
// is their mean (and norm the mean's), else 1. A unit with NaN or Inf gets exactly zero, and so
// does a given "norm" below 0, which is none.
DPFAST_HOST_DEVICE double clipping_weight(Clipping rule, double norm, double bound,
                                          double stability, double custom,
                                          double averaged_rows = 1.0) {
  if (!(norm >= 0.0 && norm <= 1.7976931348623157e308)) return 0.0;
  const double weight = normal_or_zero(rule_weight(rule, norm, bound, stability, custom));
  return normal_or_zero(weight / averaged_rows);
}

// The weight cut to 29 significant bits, toward zero (2^-28 relative at most): its product with a
// 24-bit element is then exact in float64, and FMA gives the same bits as multiply and add.
DPFAST_HOST_DEVICE double short_weight(double weight) {
#if defined(__CUDA_ARCH__)
  return __longlong_as_double(__double_as_longlong(weight) & ~0xffffffll);
#else
  std::int64_t bits;
  std::memcpy(&bits, &weight, sizeof bits);
  bits &= ~std::int64_t{0xffffff};
  std::memcpy(&weight, &bits, sizeof bits);
  return weight;
#endif
}

// Noise scale of group k: z * gamma_k * D with D^2 = sum_j (C_j / gamma_j)^2, or
// D = sum_j C_j / gamma_j where the mechanism pays by the L1 norm (Laplace after an L1 clip).
// For one group it is z * C. Accumulate D over the groups, then finish it.
DPFAST_HOST_DEVICE double add_group(double total, double bound, double gamma, bool l1) {
  const double term = bound / gamma;
  return total + (l1 ? term : term * term);
}

DPFAST_HOST_DEVICE double noise_scale(double total, double gamma, double noise_multiplier,
                                      bool l1) {
  return noise_multiplier * gamma * (l1 ? total : std::sqrt(total));
}

// The percentile of m sorted values, linear between ranks: position and blend of the two values.
struct Rank {
  std::int64_t lower;
  double blend;
};

DPFAST_HOST_DEVICE Rank percentile_rank(double percentile, std::int64_t m) {
  const double position = percentile / 100.0 * static_cast<double>(m - 1);
  std::int64_t lower = static_cast<std::int64_t>(position);
  if (lower > m - 2) lower = m - 2;
  if (lower < 0) lower = 0;
  return {lower, position - static_cast<double>(lower)};
}

}  // namespace dpfast::math
