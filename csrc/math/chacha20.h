// ChaCha20 block function (RFC 8439, section 2.3), for any unsigned 32-bit lane type.
//
// With a vector type each lane computes its own block: no shuffles.
#pragma once

#include <cstdint>

#include "math/macros.h"

namespace dpfast::math {

constexpr int kChaChaWords = 16;
constexpr int kChaChaKeyWords = 8;
constexpr int kChaChaDoubleRounds = 10;

template <class U>
DPFAST_HOST_DEVICE U rotate_left(U x, int n) {
  return (x << n) | (x >> (32 - n));
}

template <class U>
DPFAST_HOST_DEVICE void quarter_round(U& a, U& b, U& c, U& d) {
  a += b;
  d = rotate_left(d ^ a, 16);
  c += d;
  b = rotate_left(b ^ c, 12);
  a += b;
  d = rotate_left(d ^ a, 8);
  c += d;
  b = rotate_left(b ^ c, 7);
}

// What may be done between steps of the arithmetic: nothing, or (on the CPU) asking for memory.
struct Nothing {
#if defined(__CUDACC__)
  __host__ __device__
#endif
      void step() {
  }
};

// Words 0-3: the constant; 4-11: the key; 12: the block counter; 13-15: the nonce.
template <class Ops, class Between>
DPFAST_HOST_DEVICE void chacha20_block(const std::uint32_t key[kChaChaKeyWords],
                                       typename Ops::U counter, std::uint32_t nonce0,
                                       std::uint32_t nonce1, std::uint32_t nonce2,
                                       typename Ops::U out[kChaChaWords], Between& between) {
  using U = typename Ops::U;
  const U input[kChaChaWords] = {Ops::u(0x61707865u),
                                 Ops::u(0x3320646eu),
                                 Ops::u(0x79622d32u),
                                 Ops::u(0x6b206574u),
                                 Ops::u(key[0]),
                                 Ops::u(key[1]),
                                 Ops::u(key[2]),
                                 Ops::u(key[3]),
                                 Ops::u(key[4]),
                                 Ops::u(key[5]),
                                 Ops::u(key[6]),
                                 Ops::u(key[7]),
                                 counter,
                                 Ops::u(nonce0),
                                 Ops::u(nonce1),
                                 Ops::u(nonce2)};
  U x[kChaChaWords];
  for (int i = 0; i < kChaChaWords; ++i) x[i] = input[i];
  for (int round = 0; round < kChaChaDoubleRounds; ++round) {
    quarter_round(x[0], x[4], x[8], x[12]);
    quarter_round(x[1], x[5], x[9], x[13]);
    quarter_round(x[2], x[6], x[10], x[14]);
    quarter_round(x[3], x[7], x[11], x[15]);
    quarter_round(x[0], x[5], x[10], x[15]);
    quarter_round(x[1], x[6], x[11], x[12]);
    quarter_round(x[2], x[7], x[8], x[13]);
    quarter_round(x[3], x[4], x[9], x[14]);
    between.step();
  }
  for (int i = 0; i < kChaChaWords; ++i) out[i] = x[i] + input[i];
}

}  // namespace dpfast::math
