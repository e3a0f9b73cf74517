// The formulae of csrc/math on the host: what CPU and CUDA share.
#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

#include "math/clip_and_noise.h"
#include "tests/check.h"

namespace {

using namespace dpfast;
using math::Clipping;

// RFC 8439, section 2.3.2: key 00..1f, counter 1, nonce 000000090000004a00000000.
void chacha20_matches_rfc8439() {
  std::uint32_t key[8];
  for (std::uint32_t i = 0; i < 8; ++i) key[i] = 0x03020100u + 0x04040404u * i;
  const std::uint32_t expected[16] = {0xe4e7f110, 0x15593bd1, 0x1fdd0f50, 0xc47120a3,
                                      0xc7f4d1c7, 0x0368c033, 0x9aaa2204, 0x4e6cd4c3,
                                      0x466482d2, 0x09aa9f07, 0x05d7c214, 0xa2028bd9,
                                      0xd19c12b5, 0xb94e16de, 0xe883d0cb, 0x4e3c50a2};
  std::uint32_t words[16];
  math::Nothing nothing;
  math::chacha20_block<math::ScalarOps>(key, 1, 0x09000000u, 0x4a000000u, 0, words, nothing);
  for (int i = 0; i < 16; ++i) DPFAST_CHECK(words[i] == expected[i]);
}

// n * weight(n) <= C in exact arithmetic (long double has 11 bits more than the product needs
// room for), with the norm wrong by as much as the margin allows for.
void weights_never_exceed_the_bound() {
  std::mt19937_64 random(1);
  std::uniform_real_distribution<double> exponent(-60.0, 60.0), off(-1.0, 1.0);
  const Clipping rules[] = {Clipping::kFlat, Clipping::kAutomatic, Clipping::kAutoV,
                            Clipping::kPsac, Clipping::kCustom};
  for (const Clipping rule : rules) {
    for (int i = 0; i < 200000; ++i) {
      const double bound = std::pow(10.0, exponent(random) / 2.0);
      const double norm = std::pow(10.0, exponent(random));
      const double stability = std::pow(10.0, exponent(random) / 2.0);
      const double custom = off(random) * std::pow(10.0, exponent(random));
      const double computed = norm * (1.0 + off(random) * 0.5 * math::kNormMargin);
      const double weight = math::clipping_weight(rule, computed, bound * (1.0 - math::kNormMargin),
                                                  stability, custom);
      const long double size = std::fabs(static_cast<long double>(norm) * weight);
      DPFAST_CHECK(size <= static_cast<long double>(bound));
      DPFAST_CHECK(std::fabs(math::short_weight(weight)) <= std::fabs(weight));
      if (tests::failures() > 5) return;
    }
  }
}

void weights_have_their_published_values() {
  const double inf = std::numeric_limits<double>::infinity();
  const double nan = std::numeric_limits<double>::quiet_NaN();
  DPFAST_CHECK(math::clipping_weight(Clipping::kFlat, 0.5, 1.0, 1.0, 0.0) == 1.0);
  DPFAST_CHECK(math::clipping_weight(Clipping::kFlat, 4.0, 1.0, 1.0, 0.0) == 0.25);
  DPFAST_CHECK(math::clipping_weight(Clipping::kAutoV, 0.0, 1.0, 1.0, 0.0) == 0.0);
  DPFAST_CHECK(math::clipping_weight(Clipping::kAutoV, 1e-310, 1.0, 1.0, 0.0) == 0.0);
  DPFAST_CHECK(math::clipping_weight(Clipping::kAutomatic, 0.0, 1.0, 0.01, 0.0) == 100.0);
  DPFAST_CHECK(math::clipping_weight(Clipping::kNormalized, 1.5, 1.0, 0.5, 0.0) == 0.5);
  // PSAC: C at n = 0, and the maximum C / (2 sqrt(r) - r) at n = sqrt(r) - r.
  DPFAST_CHECK(math::clipping_weight(Clipping::kPsac, 0.0, 2.0, 0.25, 0.0) == 2.0);
  const double peak = math::clipping_weight(Clipping::kPsac, 0.25, 1.0, 0.25, 0.0);
  DPFAST_CHECK(std::fabs(peak - 1.0 / 0.75) < 1e-15);
  DPFAST_CHECK(math::clipping_weight(Clipping::kCustom, 4.0, 1.0, 1.0, 3.0) == 0.25);
  DPFAST_CHECK(math::clipping_weight(Clipping::kCustom, 4.0, 1.0, 1.0, -3.0) == -0.25);
  DPFAST_CHECK(math::clipping_weight(Clipping::kCustom, 4.0, 1.0, 1.0, nan) == 0.0);
  for (int rule = 0; rule <= 6; ++rule) {
    for (const double norm : {inf, nan, -1.0}) {
      DPFAST_CHECK(math::clipping_weight(static_cast<Clipping>(rule), norm, 1.0, 0.1, 1.0) == 0.0);
    }
  }
}

// A word of zero with its 32 more bits zero is the furthest the Gaussian reaches.
void gaussian_reaches_beyond_8_sigma() {
  const float largest = math::negative_log<math::ScalarOps>(0u, 0x1p-33f);
  DPFAST_CHECK(std::fabs(std::sqrt(2.0f * largest) - 9.493f) < 1e-3f);
  DPFAST_CHECK(std::fabs(std::sqrt(2.0 * math::negative_log_double(0)) - 9.493) < 1e-3);
  const float smallest = math::negative_log<math::ScalarOps>(0xffffffffu, 0.5f);
  DPFAST_CHECK(smallest > 0.0f && smallest < 2e-10f);
}

void logarithm_matches_the_exact_one() {
  std::mt19937 random(2);
  double worst = 0.0;
  for (int i = 0; i < 2000000; ++i) {
    const std::uint32_t word = random() >> (random() % 32);
    const float got = math::negative_log<math::ScalarOps>(word, 0.5f);
    const long double u = (static_cast<long double>(word) + 0.5L) * 0x1p-32L;
    const double want = static_cast<double>(-logl(u));
    worst = std::max(worst, std::fabs(got - want) / want);
  }
  std::printf("worst relative error of -ln u: %.2e\n", worst);
  DPFAST_CHECK(worst < 3e-7);
}

void percentile_ranks_are_linear() {
  DPFAST_CHECK(math::percentile_rank(0.0, 5).lower == 0);
  DPFAST_CHECK(math::percentile_rank(100.0, 5).lower == 3 &&
               math::percentile_rank(100.0, 5).blend == 1.0);
  DPFAST_CHECK(math::percentile_rank(50.0, 5).lower == 2 &&
               math::percentile_rank(50.0, 5).blend == 0.0);
  DPFAST_CHECK(math::percentile_rank(50.0, 1).lower == 0 &&
               math::percentile_rank(50.0, 1).blend == 0.0);
}

}  // namespace

int main() {
  chacha20_matches_rfc8439();
  weights_never_exceed_the_bound();
  weights_have_their_published_values();
  gaussian_reaches_beyond_8_sigma();
  logarithm_matches_the_exact_one();
  percentile_ranks_are_linear();
  return dpfast::tests::report("math");
}
