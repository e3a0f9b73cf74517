"""ChaCha20 by the book, and the exact noise transforms of its words in float64."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch

__all__ = [
    "chacha20_block",
    "gaussian_from_words",
    "laplace_from_words",
    "noise_words",
    "seed_key",
    "standard_noise",
]

_MASK = 0xFFFFFFFF
_CONSTANT = (0x61707865, 0x3320646E, 0x79622D32, 0x6B206574)  # "expand 32-byte k"
_QUARTERS = (
    (0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15),
    (0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14),
)  # fmt: skip
_WORDS = 16  # of a block
_LANES = 16  # blocks whose words interleave
_GROUP = _WORDS * _LANES
_EXTENSION_BIT = 1 << 31  # in the tensor word of the nonce
_EXTENSION_BELOW = 1 << 16  # words below this have 32 bits more
_BLOCKS_AT_ONCE = 8192  # what fits the processor's cache


def seed_key(seed: int) -> bytes:
    """The 256-bit key of ``NoiseSource(seed=seed)``."""
    return hashlib.sha256(b"dpfast seed " + str(seed).encode()).digest()


def _rotate_left(x: torch.Tensor, n: int) -> torch.Tensor:
    return ((x << n) & _MASK) | (x >> (32 - n))


def chacha20_block(key: Sequence[int], counter: torch.Tensor, nonce: Sequence[int]) -> torch.Tensor:
    """The ChaCha20 block function of RFC 8439, section 2.3.1.

    Args:
      key: 8 words of 32 bits.
      counter: int64, shape (N,), each in [0, 2^32).
      nonce: 3 words of 32 bits.

    Returns:
      int64, shape (N, 16): the words of N blocks, each in [0, 2^32).

    References:
      RFC 8439, section 2.3.
    """
    fixed = [torch.full_like(counter, word) for word in (*_CONSTANT, *key)]
    initial = [*fixed, counter, *(torch.full_like(counter, word) for word in nonce)]
    state = list(initial)
    for _ in range(10):
        for a, b, c, d in _QUARTERS:
            state[a] = (state[a] + state[b]) & _MASK
            state[d] = _rotate_left(state[d] ^ state[a], 16)
            state[c] = (state[c] + state[d]) & _MASK
            state[b] = _rotate_left(state[b] ^ state[c], 12)
            state[a] = (state[a] + state[b]) & _MASK
            state[d] = _rotate_left(state[d] ^ state[a], 8)
            state[c] = (state[c] + state[d]) & _MASK
            state[b] = _rotate_left(state[b] ^ state[c], 7)
    return torch.stack(
        [(x + start) & _MASK for x, start in zip(state, initial, strict=True)], dim=1
    )


def noise_words(
    key: bytes,
    step: int,
    tensor: int,
    first_block: int,
    num_blocks: int,
    *,
    extension: bool = False,
) -> torch.Tensor:
    """The words behind one tensor's noise at one step.

    Args:
      key: 32 bytes, little-endian words as in RFC 8439.
      step: the noise source's count before the call.
      tensor: index of the tensor in the call; with ``step`` it makes the nonce.
      first_block: the block counter of the first block.
      num_blocks: how many blocks.
      extension: the further 32 bits of each word instead of the word.

    Returns:
      int64, shape (num_blocks, 16).
    """
    words = [int.from_bytes(key[i : i + 4], "little") for i in range(0, 32, 4)]
    nonce = (tensor | (_EXTENSION_BIT if extension else 0), step & _MASK, step >> 32)
    parts = [
        chacha20_block(words, torch.arange(start, min(start + _BLOCKS_AT_ONCE, end)), nonce)
        for end in (first_block + num_blocks,)
        for start in range(first_block, end, _BLOCKS_AT_ONCE)
    ]
    return torch.cat(parts) if parts else torch.empty(0, _WORDS, dtype=torch.int64)


def _negative_log(high: torch.Tensor, fraction: torch.Tensor) -> torch.Tensor:
    """-ln(u), u = (high + fraction) / 2^32 in (0, 1), accurate at both ends."""
    u = (high.double() + fraction) * 2.0**-32
    # 1 - u from the integers: (2^32 - high) is exact, so nothing cancels near u = 1.
    complement = ((2**32 - high).double() - fraction) * 2.0**-32
    return torch.where(u < 0.5, -torch.log(u), -torch.log1p(-complement))


def gaussian_from_words(
    words: torch.Tensor, more: torch.Tensor, *, double_precision: bool = False
) -> torch.Tensor:
    """Standard normal samples by the exact Box-Muller transform.

    Words 2p and 2p + 1 are radius and angle. In single precision the radius is sqrt(-2 ln u) with
    u = (radius + 1/2) / 2^32, or (radius + (more + 1/2) / 2^32) / 2^32 where the radius word is
    below 2^16. Of the angle word, bits 0-29 are x in (-pi/4, pi/4), bit 31 negates cos x and bit
    30 exchanges cosine and sine: together an even circle. In double precision both have 64 bits,
    ``words`` over ``more``.

    Args:
      words: int64, shape (N, 16).
      more: int64, shape (N, 16), the extension words of the same blocks.
      double_precision: the layout for float64 gradients.

    Returns:
      float64, shape (N, 16).

    References:
      Box and Muller 1958, doi:10.1214/aoms/1177706645.
    """
    radius_word, angle_word = words[:, 0::2], words[:, 1::2]
    radius_more, angle_more = more[:, 0::2], more[:, 1::2]
    fine = (radius_more.double() + 0.5) * 2.0**-32
    if double_precision:
        fraction, angle_fraction = fine, (angle_more.double() + 0.5) * 2.0**-32
    else:
        half = torch.full_like(fine, 0.5)
        fraction = torch.where(radius_word < _EXTENSION_BELOW, fine, half)
        angle_fraction = half
    radius = torch.sqrt(2.0 * _negative_log(radius_word, fraction))
    # Bits 0-29 as a signed number of cells, at their centres, over (-pi/4, pi/4).
    cells = angle_word & (2**30 - 1)
    signed = torch.where(cells >= 2**29, cells - 2**30, cells)
    x = math.pi / 4 * (signed.double() + angle_fraction) * 2.0**-29
    cosine = torch.where(angle_word >= 2**31, -x.cos(), x.cos())
    exchange = (angle_word >> 30) & 1 == 1
    first = torch.where(exchange, x.sin(), cosine)
    second = torch.where(exchange, cosine, x.sin())
    return torch.stack((radius * first, radius * second), dim=2).flatten(1)


def laplace_from_words(
    words: torch.Tensor, more: torch.Tensor, *, double_precision: bool = False
) -> torch.Tensor:
    """Standard Laplace samples (density exp(-|x|) / 2), one per word.

    Bit 0 is the sign; the magnitude is -ln u with u = (even + 1) / 2^32, even the word without
    bit 0. Where the word is below 2^16, u = (even + (2 more + 1) / 2^32) / 2^32; in double
    precision u = (even + (2 more + 1/2) / 2^32) / 2^32 everywhere.

    Args:
      words: int64, shape (N, 16).
      more: int64, shape (N, 16), the extension words of the same blocks.
      double_precision: the layout for float64 gradients.

    Returns:
      float64, shape (N, 16).
    """
    even = words & ~1
    if double_precision:
        fraction = (2.0 * more.double() + 0.5) * 2.0**-32
    else:
        fine = (more.double() + 0.5) * 2.0**-31
        fraction = torch.where(words < _EXTENSION_BELOW, fine, torch.ones_like(fine))
    magnitude = _negative_log(even, fraction)
    return torch.where(words & 1 == 1, -magnitude, magnitude)


def standard_noise(
    key: bytes,
    step: int,
    tensor: int,
    mechanism: str,
    count: int,
    *,
    double_precision: bool = False,
) -> torch.Tensor:
    """Noise of scale 1 of elements [0, count) of one tensor at one step.

    Element e has word (e % 256) // 16 of block 16 (e // 256) + e % 16.

    Args:
      key: 32 bytes; ``seed_key(seed)`` for a seeded source.
      step: the noise source's count before the call.
      tensor: index of the tensor in the call.
      mechanism: "gaussian" or "laplace".
      count: number of elements.
      double_precision: the layout for float64 gradients.

    Returns:
      float64, shape (count,).

    Raises:
      ValueError: another mechanism.
    """
    transforms = {"gaussian": gaussian_from_words, "laplace": laplace_from_words}
    if mechanism not in transforms:
        raise ValueError(
            f"standard_noise: mechanism must be gaussian or laplace, got {mechanism!r}"
        )
    groups = -(-count // _GROUP)
    words = noise_words(key, step, tensor, 0, groups * _LANES)
    more = noise_words(key, step, tensor, 0, groups * _LANES, extension=True)
    samples = transforms[mechanism](words, more, double_precision=double_precision)
    # [groups, lane, word] -> [groups, word, lane]
    return samples.reshape(groups, _LANES, _WORDS).transpose(1, 2).reshape(-1)[:count]
