// Gaussian and Laplace noise as a pure function of (key, step, tensor, element).
//
// Element e of a tensor takes word (e % 256) / 16 of ChaCha20 block (e / 256) * 16 + e % 16: 256
// consecutive elements are 16 blocks side by side, so that SIMD lanes are blocks and the results
// land in order. The nonce is (tensor, step): RFC 8439's 32-bit counter covers 2^36 elements.
//
// Gaussian: Box-Muller on the pair of words (2p, 2p + 1) = (radius, angle). The radius has
// 32 bits, and where they are below 2^16 (so that the tail would be cut at 6.8 sigma or coarse)
// 32 more from a second block; the largest value is sqrt(2 ln 2^65) = 9.49 sigma.
// Laplace: one word a sample, 1 bit of sign and 31 (+32 more in the tail) of magnitude.
//
// In single precision every result is within 4e-7 (relative to the larger of 1 and its size) of
// the exact transform of the same words (tests/ops/test_noise.py measures it). The polynomials
// are least-maximum fits made for this file: ln to 3e-8, sin to 4e-9, cos to 1e-10.
#pragma once

#include <cmath>
#include <cstdint>

#include "math/chacha20.h"
#include "math/lanes.h"
#include "math/macros.h"

namespace dpfast::math {

enum class Mechanism : int { kNone = 0, kGaussian = 1, kLaplace = 2 };

constexpr int kNoiseLanes = 16;
constexpr int kNoiseGroup = kNoiseLanes * kChaChaWords;  // elements per 16 blocks
constexpr std::int64_t kMaxNoiseElements = std::int64_t{1} << 36;
constexpr std::uint32_t kExtensionBit = 0x80000000u;  // in the tensor word of the nonce
constexpr std::uint32_t kExtensionBelow = 1u << 16;

struct NoiseStream {
  std::uint32_t key[kChaChaKeyWords];
  std::uint64_t step;
};

template <class Ops, class Between>
DPFAST_HOST_DEVICE void noise_words(const NoiseStream& stream, std::uint32_t tensor,
                                    typename Ops::U block, typename Ops::U words[kChaChaWords],
                                    Between& between) {
  chacha20_block<Ops>(stream.key, block, tensor, static_cast<std::uint32_t>(stream.step),
                      static_cast<std::uint32_t>(stream.step >> 32), words, between);
}

template <class Ops>
DPFAST_HOST_DEVICE void noise_words(const NoiseStream& stream, std::uint32_t tensor,
                                    typename Ops::U block, typename Ops::U words[kChaChaWords]) {
  Nothing nothing;
  noise_words<Ops>(stream, tensor, block, words, nothing);
}

// -ln(u) for u = (high + fraction) / 2^32, 0 < fraction <= 1.
template <class Ops>
DPFAST_HOST_DEVICE typename Ops::F negative_log(typename Ops::U high, typename Ops::F fraction) {
  using F = typename Ops::F;
  using U = typename Ops::U;
  const std::uint32_t sqrt_half_bits = 0x3f3504f3u;
  const U near_one = Ops::u(0xb504f334u);                   // sqrt(1/2) * 2^32
  const F value = Ops::add(Ops::to_float(high), fraction);  // u * 2^32
  // u = 2^(exponent - 32) * mantissa with the mantissa in [sqrt(1/2), sqrt(2)).
  const U bits = Ops::as_uint(value);
  const U exponent = Ops::arithmetic_shift_right(bits - Ops::u(sqrt_half_bits), 23);
  const F mantissa = Ops::as_float(bits - (exponent << 23));
  // Near u = 1 the difference u - 1 is taken from the integers, where it is exact.
  const F complement =
      Ops::add(Ops::to_float(~high), Ops::fma(fraction, Ops::f(-1.0f), Ops::f(1.0f)));
  const F f = Ops::if_less(high, near_one, Ops::add(mantissa, Ops::f(-1.0f)),
                           Ops::mul(complement, Ops::f(-0x1p-32f)));
  const F octaves =
      Ops::signed_to_float(Ops::if_less_u(high, near_one, Ops::u(32) - exponent, Ops::u(0)));
  // ln(1 + f) = f - f^2/2 + f^3 P(f)
  F p = Ops::f(0x1.645790p-4f);
  p = Ops::fma(p, f, Ops::f(-0x1.243286p-3f));
  p = Ops::fma(p, f, Ops::f(0x1.31756ep-3f));
  p = Ops::fma(p, f, Ops::f(-0x1.538258p-3f));
  p = Ops::fma(p, f, Ops::f(0x1.98d7dap-3f));
  p = Ops::fma(p, f, Ops::f(-0x1.000382p-2f));
  p = Ops::fma(p, f, Ops::f(0x1.5556dap-2f));
  p = Ops::fma(p, f, Ops::f(-0.5f));
  const F log_mantissa = Ops::fma(Ops::mul(f, f), p, f);
  return Ops::fma(octaves, Ops::f(0x1.62e430p-1f), Ops::mul(log_mantissa, Ops::f(-1.0f)));
}

// A point of the unit circle: the low 30 bits are an angle x in (-pi/4, pi/4), bit 31 negates
// cos x and bit 30 exchanges the coordinates. sin x is symmetric, so this covers the circle
// evenly.
template <class Ops>
DPFAST_HOST_DEVICE void circle_point(typename Ops::U word, typename Ops::F& first,
                                     typename Ops::F& second) {
  using F = typename Ops::F;
  const F step = Ops::f(0x1.921fb6p-32f);  // pi / 4 / 2^31
  const F x = Ops::fma(Ops::signed_to_float(word << 2), step, Ops::f(0x1.921fb6p-31f));
  const F square = Ops::mul(x, x);
  F s = Ops::f(-0x1.994eacp-13f);
  s = Ops::fma(s, square, Ops::f(0x1.110760p-7f));
  s = Ops::fma(s, square, Ops::f(-0x1.555546p-3f));
  s = Ops::fma(Ops::mul(x, square), s, x);
  F c = Ops::f(0x1.9a0250p-16f);
  c = Ops::fma(c, square, Ops::f(-0x1.6c0c8cp-10f));
  c = Ops::fma(c, square, Ops::f(0x1.55554ap-5f));
  c = Ops::fma(c, square, Ops::f(-0.5f));
  c = Ops::fma(c, square, Ops::f(1.0f));
  c = Ops::as_float(Ops::as_uint(c) ^ (word & Ops::u(0x80000000u)));
  first = Ops::if_bit(word, 0x40000000u, s, c);
  second = Ops::if_bit(word, 0x40000000u, c, s);
}

// 16 standard normals from the 16 words of a block, one block per lane.
template <class Ops, class Between>
DPFAST_HOST_DEVICE void gaussian_block(const NoiseStream& stream, std::uint32_t tensor,
                                       typename Ops::U block, typename Ops::F out[kChaChaWords],
                                       Between& between) {
  using F = typename Ops::F;
  using U = typename Ops::U;
  U words[kChaChaWords];
  noise_words<Ops>(stream, tensor, block, words, between);
  U lowest = words[0];
  for (int p = 2; p < kChaChaWords; p += 2) lowest = Ops::minimum(lowest, words[p]);
  const bool extend = Ops::any_less(lowest, kExtensionBelow);  // once in 8,192 blocks
  U more[kChaChaWords];
  if (extend) noise_words<Ops>(stream, tensor | kExtensionBit, block, more);
  for (int p = 0; p < kChaChaWords; p += 2) {
    F fraction = Ops::f(0.5f);
    if (extend) {
      const F fine = Ops::fma(Ops::to_float(more[p]), Ops::f(0x1p-32f), Ops::f(0x1p-33f));
      fraction = Ops::if_less(words[p], Ops::u(kExtensionBelow), fine, fraction);
    }
    const F exponential = negative_log<Ops>(words[p], fraction);
    const F radius = Ops::sqrt(Ops::add(exponential, exponential));
    F first, second;
    circle_point<Ops>(words[p + 1], first, second);
    out[p] = Ops::mul(radius, first);
    out[p + 1] = Ops::mul(radius, second);
    between.step();
  }
}

// 16 standard Laplace samples (scale 1) from the 16 words of a block.
template <class Ops, class Between>
DPFAST_HOST_DEVICE void laplace_block(const NoiseStream& stream, std::uint32_t tensor,
                                      typename Ops::U block, typename Ops::F out[kChaChaWords],
                                      Between& between) {
  using F = typename Ops::F;
  using U = typename Ops::U;
  U words[kChaChaWords];
  noise_words<Ops>(stream, tensor, block, words, between);
  U lowest = words[0];
  for (int i = 1; i < kChaChaWords; ++i) lowest = Ops::minimum(lowest, words[i]);
  const bool extend = Ops::any_less(lowest, kExtensionBelow);  // once in 4,096 blocks
  U more[kChaChaWords];
  if (extend) noise_words<Ops>(stream, tensor | kExtensionBit, block, more);
  for (int i = 0; i < kChaChaWords; ++i) {
    // Bit 0 is the sign, so a cell of the magnitude is two integers wide.
    F fraction = Ops::f(1.0f);
    if (extend) {
      const F fine = Ops::fma(Ops::to_float(more[i]), Ops::f(0x1p-31f), Ops::f(0x1p-32f));
      fraction = Ops::if_less(words[i], Ops::u(kExtensionBelow), fine, fraction);
    }
    const F magnitude = negative_log<Ops>(words[i] & Ops::u(~1u), fraction);
    out[i] = Ops::as_float(Ops::as_uint(magnitude) ^ (words[i] << 31));
    between.step();
  }
}

// The same from two words each in double precision: 64 bits of radius and of angle. The words
// are those of the single-precision form, so the two agree to single precision but for the
// rounding of the radius (up to 2^-17 relative to u).
DPFAST_HOST_DEVICE double negative_log_double(std::uint64_t bits) {
  const double value = (static_cast<double>(bits) + 0.5) * 0x1p-64;
  const double complement = (static_cast<double>(~bits) + 0.5) * 0x1p-64;
  return value < 0.7 ? -std::log(value) : -std::log1p(-complement);
}

DPFAST_HOST_DEVICE std::uint64_t join_words(std::uint32_t high, std::uint32_t low) {
  return (static_cast<std::uint64_t>(high) << 32) | low;
}

DPFAST_HOST_DEVICE void gaussian_pair_double(std::uint64_t radius_bits, std::uint64_t angle_bits,
                                             double out[2]) {
  const double radius = std::sqrt(2.0 * negative_log_double(radius_bits));
  // 62 bits of angle in (-pi/4, pi/4), then the same two bits as circle_point().
  const double turn =
      (static_cast<double>(static_cast<std::int64_t>(angle_bits << 2)) + 2.0) * 0x1p-63;
  const double x = 0.78539816339744830962 * turn;
  const double sine = radius * std::sin(x);
  const double cosine = (angle_bits >> 63 ? -radius : radius) * std::cos(x);
  const bool exchange = (angle_bits >> 62) & 1;
  out[0] = exchange ? sine : cosine;
  out[1] = exchange ? cosine : sine;
}

DPFAST_HOST_DEVICE double laplace_double(std::uint32_t word, std::uint32_t more) {
  const double magnitude =
      negative_log_double(join_words(word & ~1u, 0) + 2 * static_cast<std::uint64_t>(more));
  return (word & 1u) ? -magnitude : magnitude;
}

}  // namespace dpfast::math
