"""Where the noise's randomness comes from."""

from __future__ import annotations

import hashlib
import os
import secrets
import weakref
from typing import Any

import torch

from dpfast import _native
from dpfast.errors import PrivacyError

__all__ = ["NoiseSource", "default_state"]

_KEY_WORDS = 4  # int64 words of a 256-bit key; the fifth word counts steps
_MAX_STEP = 2**62  # the count is a signed 64-bit number and must never wrap
_FORMAT = "dpfast.NoiseSource/1"


def _pack(key: bytes, step: int, device: torch.device) -> torch.Tensor:
    words = [
        int.from_bytes(key[i : i + 8], "little", signed=True) for i in range(0, 8 * _KEY_WORDS, 8)
    ]
    return torch.tensor([*words, step], dtype=torch.int64, device=device)


class NoiseSource:
    """A ChaCha20 key and the number of steps it has served.

    The noise of a step is a function of (key, step, tensor, element) alone (RFC 8439, counter
    mode); each noisy call takes the next step number atomically, on the device, so also inside
    ``torch.compile`` and a replayed CUDA graph no counter is used twice.

    Without a seed the 256-bit key comes from the operating system. With a seed the noise can be
    recomputed by whoever knows the seed: ``secure`` is False and no privacy guarantee holds.

    A source cannot be copied or pickled, since a copy would repeat its noise. In a forked child
    process a secure source gets a key of its own; a seeded one repeats its parent's noise. The key
    is a secret: who holds it can subtract the noise.

    Args:
      seed: an int >= 0 for reproducible, insecure noise; None for the operating system's key.
      device: where the state lives at first; it follows the gradients that it is used with.

    Raises:
      TypeError, ValueError: the seed is not None or an int >= 0.

    References:
      RFC 8439; DP_SPEC section 8: noise must come from a cryptographic generator.
    """

    def __init__(self, seed: int | None = None, *, device: torch.device | str = "cpu") -> None:
        if seed is None:
            key = secrets.token_bytes(8 * _KEY_WORDS)
        elif isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"NoiseSource: seed must be an int or None, got {type(seed).__name__}")
        elif seed < 0:
            raise ValueError("NoiseSource: seed must be >= 0")
        else:
            key = hashlib.sha256(b"dpfast seed " + str(seed).encode()).digest()
        self._secure = seed is None
        self._state = _pack(key, 0, torch.device(device))
        _LIVE.add(self)

    @property
    def secure(self) -> bool:
        """Whether the key came from the operating system and is known to this process alone."""
        return self._secure

    @property
    def step(self) -> int:
        """The number of noisy calls served (reads the device: it synchronises on CUDA)."""
        return int(self._state[_KEY_WORDS].item())

    def state_on(self, device: torch.device) -> torch.Tensor:
        """The state as the kernels take it: int64 (5,) on ``device``, advanced in place."""
        if self._state.device != device:
            self._state = self._state.to(device)
        return self._state

    def random_words(self, count: int) -> torch.Tensor:
        """Uniform, independent words of 64 bits for choosing who is sampled.

        One step of the key serves them, as it would a noisy call; the state moves to the CPU.

        Returns:
          int64, shape (count,): every bit is uniform, the sign included.
        """
        return _native.random_words(self.state_on(torch.device("cpu")), count)

    def spawn(self, purpose: str) -> NoiseSource:
        """A source with a key of its own, for another purpose than this one's.

        A secure source's child takes its key from the operating system; a seeded source's child is
        a function of the seed and the purpose, and as insecure.
        """
        if self._secure:
            return NoiseSource()
        label = b"dpfast spawn " + purpose.encode() + b" "
        return NoiseSource._keyed(hashlib.sha256(label + self._key()).digest(), secure=False)

    @classmethod
    def _keyed(cls, key: bytes, *, secure: bool) -> NoiseSource:
        """With a key that several processes of one run share."""
        source = cls(0)
        source._secure, source._state = secure, _pack(key, 0, torch.device("cpu"))
        return source

    def state_dict(self) -> dict[str, Any]:
        """The state to put in a checkpoint.

        A secure source saves its step count and never its key: a checkpoint travels with the
        model, and whoever reads the key can remove the noise. A seeded source saves all.
        """
        state: dict[str, Any] = {"format": _FORMAT, "secure": self._secure, "step": self.step}
        if not self._secure:
            state["key"] = self._key().hex()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; no (key, step) pair is ever used twice.

        A secure source takes a fresh key from the operating system and the saved step count. A
        seeded source goes on bit for bit, and refuses to step back on its own key.

        Raises:
          ValueError: not a state of this format, or damaged.
          PrivacyError: a seeded state loaded into a secure source, or a step already used.
        """
        fields = {"format", "secure", "step"}
        if not isinstance(state, dict) or not fields <= state.keys() or state["format"] != _FORMAT:
            raise ValueError(f"NoiseSource: state must be a dict of format {_FORMAT}")
        secure, step = state["secure"], state["step"]
        if not isinstance(secure, bool) or type(step) is not int or not 0 <= step < _MAX_STEP:
            raise ValueError("NoiseSource: state has a damaged 'secure' or 'step'")
        if secure != self._secure:
            raise PrivacyError(
                "NoiseSource: a secure and a seeded source cannot take each other's state"
            )
        if secure:
            key = secrets.token_bytes(8 * _KEY_WORDS)
        else:
            try:
                key = bytes.fromhex(state["key"])
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError("NoiseSource: state has a damaged 'key'") from error
            if len(key) != 8 * _KEY_WORDS:
                raise ValueError("NoiseSource: state has a damaged 'key'")
            if key == self._key() and step < self.step:
                raise PrivacyError(
                    f"NoiseSource: state is at step {step}, this source has used "
                    f"{self.step}: its noise would be repeated"
                )
        self._state = _pack(key, step, self._state.device)

    def _key(self) -> bytes:
        words = self._state[:_KEY_WORDS].tolist()
        return b"".join(int(word).to_bytes(8, "little", signed=True) for word in words)

    def _after_fork(self) -> None:
        # The CUDA state of a parent is unusable in a forked child, so the step is read from the
        # CPU only; with a fresh key the count may restart at 0.
        if self._secure:
            step = self.step if self._state.device.type == "cpu" else 0
            self._state = _pack(secrets.token_bytes(8 * _KEY_WORDS), step, torch.device("cpu"))

    def __copy__(self) -> NoiseSource:
        raise PrivacyError("NoiseSource: cannot be copied, the copy would repeat its noise")

    def __deepcopy__(self, memo: dict[int, Any]) -> NoiseSource:
        raise PrivacyError("NoiseSource: cannot be copied, the copy would repeat its noise")

    def __reduce__(self) -> tuple[Any, ...]:
        raise PrivacyError("NoiseSource: cannot be pickled; save state_dict() instead")

    def __repr__(self) -> str:
        return f"NoiseSource(secure={self._secure}, device='{self._state.device}')"


_LIVE: weakref.WeakSet[NoiseSource] = weakref.WeakSet()
_DEFAULTS: dict[torch.device, NoiseSource] = {}


def default_state(device: torch.device) -> torch.Tensor:
    """The state of this process's own secure source for ``device``."""
    if device not in _DEFAULTS:
        _DEFAULTS[device] = NoiseSource(device=device)
    return _DEFAULTS[device].state_on(device)


def _rekey_after_fork() -> None:
    _DEFAULTS.clear()
    for source in list(_LIVE):
        source._after_fork()


os.register_at_fork(after_in_child=_rekey_after_fork)
