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

// Words below kExtensionBelow get 32 bits more, from the same words of a second block.
template <class Ops>
DPFAST_HOST_DEVICE typename Ops::F extended_fraction(typename Ops::U word, typename Ops::U more,
                                                     float cell) {
  using F = typename Ops::F;
  const F fine = Ops::fma(Ops::to_float(more), Ops::f(cell * 0x1p-32f), Ops::f(cell * 0x1p-33f));
  return Ops::if_less(word, Ops::u(kExtensionBelow), fine, Ops::f(cell * 0.5f));
}

// Two standard normals from a radius word and an angle word. fraction: of the radius's cell.
struct Gaussian {
  static constexpr int kEvery = 2;      // words of a block that may need more bits
  static constexpr float kCell = 1.0f;  // integers that a cell of the magnitude spans

  template <class Ops>
  DPFAST_HOST_DEVICE void pair(const typename Ops::U words[2], const typename Ops::F fraction[2],
                               typename Ops::F out[2]) {
    using F = typename Ops::F;
    const F exponential = negative_log<Ops>(words[0], fraction[0]);
    const F radius = Ops::sqrt(Ops::add(exponential, exponential));
    F first, second;
    circle_point<Ops>(words[1], first, second);
    out[0] = Ops::mul(radius, first);
    out[1] = Ops::mul(radius, second);
  }
};

// Two standard Laplace samples (scale 1), each from one word: bit 0 is the sign, so that a cell of
// the magnitude is two integers wide.
struct Laplace {
  static constexpr int kEvery = 1;
  static constexpr float kCell = 2.0f;

  template <class Ops>
  DPFAST_HOST_DEVICE void pair(const typename Ops::U words[2], const typename Ops::F fraction[2],
                               typename Ops::F out[2]) {
    for (int i = 0; i < 2; ++i) {
      const typename Ops::F magnitude = negative_log<Ops>(words[i] & Ops::u(~1u), fraction[i]);
      out[i] = Ops::as_float(Ops::as_uint(magnitude) ^ (words[i] << 31));
    }
  }
};

// Whether some lane needs the second block: once in 8,192 (Gaussian) or 4,096 (Laplace) blocks.
template <class Law, class Ops>
DPFAST_HOST_DEVICE bool needs_extension(const typename Ops::U words[kChaChaWords]) {
  typename Ops::U lowest = words[0];
  for (int w = Law::kEvery; w < kChaChaWords; w += Law::kEvery) {
    lowest = Ops::minimum(lowest, words[w]);
  }
  return Ops::any_less(lowest, kExtensionBelow);
}

// 16 samples from the 16 words of a block where needs_extension() is true; more: the same words of
// the second block.
template <class Law, class Ops>
DPFAST_HOST_DEVICE void extended_samples(const typename Ops::U words[kChaChaWords],
                                         const typename Ops::U more[kChaChaWords],
                                         typename Ops::F out[kChaChaWords]) {
  for (int w = 0; w < kChaChaWords; w += 2) {
    const typename Ops::F fraction[2] = {
        extended_fraction<Ops>(words[w], more[w], Law::kCell),
        extended_fraction<Ops>(words[w + 1], more[w + 1], Law::kCell)};
    Law::template pair<Ops>(words + w, fraction, out + w);
  }
}

template <class Law, class Ops>
DPFAST_HOST_DEVICE void plain_pair(const typename Ops::U words[2], typename Ops::F out[2]) {
  const typename Ops::F half = Ops::f(0.5f * Law::kCell);
  const typename Ops::F fraction[2] = {half, half};
  Law::template pair<Ops>(words, fraction, out);
}

// 16 samples from the 16 words of a block, one block per lane.
template <class Law, class Ops>
DPFAST_HOST_DEVICE void noise_block(const NoiseStream& stream, std::uint32_t tensor,
                                    typename Ops::U block, typename Ops::F out[kChaChaWords]) {
  typename Ops::U words[kChaChaWords];
  noise_words<Ops>(stream, tensor, block, words);
  if (needs_extension<Law, Ops>(words)) {
    typename Ops::U more[kChaChaWords];
    noise_words<Ops>(stream, tensor | kExtensionBit, block, more);
    extended_samples<Law, Ops>(words, more, out);
    return;
  }
  for (int w = 0; w < kChaChaWords; w += 2) plain_pair<Law, Ops>(words + w, out + w);
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
