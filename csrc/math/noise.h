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
// are least-maximum fits made for this file: ln to 6e-9, sin to 4e-9, cos to 1e-10.
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

template <class Ops>
DPFAST_HOST_DEVICE void noise_words(const NoiseStream& stream, std::uint32_t tensor,
                                    typename Ops::U block,
                                    typename Ops::U words[kChaChaWords]) {
  chacha20_block<Ops>(stream.key, block, tensor, static_cast<std::uint32_t>(stream.step),
                      static_cast<std::uint32_t>(stream.step >> 32), words);
}

// -ln(u) for u = (high + fraction) / 2^32, 0 < fraction <= 1: relative error < 3e-7.
template <class Ops>
DPFAST_HOST_DEVICE typename Ops::F negative_log(typename Ops::U high,
                                                typename Ops::F fraction) {
  using F = typename Ops::F;
  using U = typename Ops::U;
  const std::uint32_t sqrt_half_bits = 0x3f3504f3u;
  const F value = Ops::add(Ops::to_float(high), fraction);  // u * 2^32
  // u = 2^(exponent - 32) * mantissa with the mantissa in [sqrt(1/2), sqrt(2)).
  const U bits = Ops::as_uint(value);
  const U exponent = Ops::arithmetic_shift_right(bits - Ops::u(sqrt_half_bits), 23);
  const F mantissa = Ops::as_float(bits - (exponent << 23));
  // Near u = 1 the difference u - 1 is taken from the integers, where it is exact.
  const F complement =
      Ops::add(Ops::to_float(~high), Ops::add(Ops::f(1.0f), Ops::mul(fraction, Ops::f(-1.0f))));
  const U far = Ops::less(high, Ops::u(0xb504f334u));  // u < sqrt(1/2)
  const F f = Ops::select(far, Ops::add(mantissa, Ops::f(-1.0f)),
                          Ops::mul(complement, Ops::f(-0x1p-32f)));
  // ln(1 + f) = f - f^2/2 + f^3 P(f)
  F p = Ops::f(-0x1.38b37cp-4f);
  p = Ops::add(Ops::mul(p, f), Ops::f(0x1.055b82p-3f));
  p = Ops::add(Ops::mul(p, f), Ops::f(-0x1.0d85aep-3f));
  p = Ops::add(Ops::mul(p, f), Ops::f(0x1.22da20p-3f));
  p = Ops::add(Ops::mul(p, f), Ops::f(-0x1.54723ap-3f));
  p = Ops::add(Ops::mul(p, f), Ops::f(0x1.99a008p-3f));
  p = Ops::add(Ops::mul(p, f), Ops::f(-0x1.000228p-2f));
  p = Ops::add(Ops::mul(p, f), Ops::f(0x1.555554p-2f));
  const F square = Ops::mul(f, f);
  const F tail = Ops::mul(square, Ops::add(Ops::mul(p, f), Ops::f(-0.5f)));
  const F log_mantissa = Ops::add(f, tail);
  const F octaves = Ops::signed_to_float(Ops::select_u(far, Ops::u(32) - exponent, Ops::u(0)));
  return Ops::add(Ops::mul(octaves, Ops::f(0x1.62e430p-1f)),
                  Ops::mul(log_mantissa, Ops::f(-1.0f)));
}

// cos and sin of 2 pi (angle + 1/2) / 2^32: absolute error < 2e-7.
template <class Ops>
DPFAST_HOST_DEVICE void cos_sin_turn(typename Ops::U angle, typename Ops::F& cosine,
                                     typename Ops::F& sine) {
  using F = typename Ops::F;
  using U = typename Ops::U;
  const U quadrant = (angle + Ops::u(1u << 29)) >> 30;
  const U rest = angle - (quadrant << 30);  // signed, in [-2^29, 2^29)
  const F x = Ops::mul(Ops::add(Ops::signed_to_float(rest), Ops::f(0.5f)),
                       Ops::f(0x1.921fb6p-30f));  // 2 pi / 2^32
  const F square = Ops::mul(x, x);
  F s = Ops::f(-0x1.994eacp-13f);
  s = Ops::add(Ops::mul(s, square), Ops::f(0x1.110760p-7f));
  s = Ops::add(Ops::mul(s, square), Ops::f(-0x1.555546p-3f));
  s = Ops::add(x, Ops::mul(Ops::mul(x, square), s));
  F c = Ops::f(0x1.9a0250p-16f);
  c = Ops::add(Ops::mul(c, square), Ops::f(-0x1.6c0c8cp-10f));
  c = Ops::add(Ops::mul(c, square), Ops::f(0x1.55554ap-5f));
  c = Ops::add(Ops::mul(c, square), Ops::f(-0.5f));
  c = Ops::add(Ops::mul(c, square), Ops::f(1.0f));
  const U swap = Ops::u(0) - (quadrant & Ops::u(1));
  const U cosine_sign = ((quadrant + Ops::u(1)) & Ops::u(2)) << 30;
  const U sine_sign = (quadrant & Ops::u(2)) << 30;
  cosine = Ops::as_float(Ops::as_uint(Ops::select(swap, s, c)) ^ cosine_sign);
  sine = Ops::as_float(Ops::as_uint(Ops::select(swap, c, s)) ^ sine_sign);
}

// 16 standard normals from the 16 words of a block, one block per lane.
template <class Ops>
DPFAST_HOST_DEVICE void gaussian_block(const NoiseStream& stream, std::uint32_t tensor,
                                       typename Ops::U block,
                                       typename Ops::F out[kChaChaWords]) {
  using F = typename Ops::F;
  using U = typename Ops::U;
  U words[kChaChaWords];
  noise_words<Ops>(stream, tensor, block, words);
  U low = Ops::u(0);
  for (int p = 0; p < kChaChaWords; p += 2) low |= Ops::less(words[p], Ops::u(kExtensionBelow));
  const bool extend = Ops::any(low);  // once in 8,192 blocks
  U more[kChaChaWords];
  if (extend) noise_words<Ops>(stream, tensor | kExtensionBit, block, more);
  for (int p = 0; p < kChaChaWords; p += 2) {
    F fraction = Ops::f(0.5f);
    if (extend) {
      const F fine = Ops::add(Ops::mul(Ops::to_float(more[p]), Ops::f(0x1p-32f)), Ops::f(0x1p-33f));
      fraction = Ops::select(Ops::less(words[p], Ops::u(kExtensionBelow)), fine, fraction);
    }
    const F exponential = negative_log<Ops>(words[p], fraction);
    const F radius = Ops::sqrt(Ops::add(exponential, exponential));
    F cosine, sine;
    cos_sin_turn<Ops>(words[p + 1], cosine, sine);
    out[p] = Ops::mul(radius, cosine);
    out[p + 1] = Ops::mul(radius, sine);
  }
}

// 16 standard Laplace samples (scale 1) from the 16 words of a block.
template <class Ops>
DPFAST_HOST_DEVICE void laplace_block(const NoiseStream& stream, std::uint32_t tensor,
                                      typename Ops::U block,
                                      typename Ops::F out[kChaChaWords]) {
  using F = typename Ops::F;
  using U = typename Ops::U;
  U words[kChaChaWords];
  noise_words<Ops>(stream, tensor, block, words);
  U low = Ops::u(0);
  for (int i = 0; i < kChaChaWords; ++i) low |= Ops::less(words[i], Ops::u(kExtensionBelow));
  const bool extend = Ops::any(low);  // once in 4,096 blocks
  U more[kChaChaWords];
  if (extend) noise_words<Ops>(stream, tensor | kExtensionBit, block, more);
  for (int i = 0; i < kChaChaWords; ++i) {
    // Bit 0 is the sign, so a cell of the magnitude is two integers wide.
    F fraction = Ops::f(1.0f);
    if (extend) {
      const F fine = Ops::add(Ops::mul(Ops::to_float(more[i]), Ops::f(0x1p-31f)), Ops::f(0x1p-32f));
      fraction = Ops::select(Ops::less(words[i], Ops::u(kExtensionBelow)), fine, fraction);
    }
    const F magnitude = negative_log<Ops>(words[i] & Ops::u(~1u), fraction);
    out[i] = Ops::as_float(Ops::as_uint(magnitude) ^ (words[i] << 31));
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
  // The signed angle in (-pi, pi) keeps full relative precision around zero.
  const double turn = (static_cast<double>(static_cast<std::int64_t>(angle_bits)) + 0.5) * 0x1p-64;
  const double angle = 6.283185307179586476925 * turn;
  out[0] = radius * std::cos(angle);
  out[1] = radius * std::sin(angle);
}

DPFAST_HOST_DEVICE double laplace_double(std::uint32_t word, std::uint32_t more) {
  const double magnitude =
      negative_log_double(join_words(word & ~1u, 0) + 2 * static_cast<std::uint64_t>(more));
  return (word & 1u) ? -magnitude : magnitude;
}

}  // namespace dpfast::math
