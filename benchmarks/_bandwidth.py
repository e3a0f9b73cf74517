"""What the machine's memory gives: the floor that the ops are measured against."""

from __future__ import annotations

import statistics

import torch

from benchmarks._timing import Contender, largest_cache_bytes
from dpfast import _native

__all__ = ["Bandwidth"]

_CPU_BUFFER_BYTES = 512 * 2**20
_CUDA_BUFFER_BYTES = 2**30
_QUICK_BUFFER_BYTES = 64 * 2**20


class Bandwidth:
    """Contenders that stream a buffer much larger than any cache, timed in the op's own rounds.

    On the CPU a read: the better of dpfast's native read-everything kernel and torch.sum, with the
    same number of threads. On CUDA a copy within the device, counting bytes read and written.

    Args:
      device: where.
      quick: use a small buffer, for trying out the harness; its figures mean nothing.
    """

    def __init__(self, device: torch.device, *, quick: bool) -> None:
        if device.type == "cuda":
            size = _QUICK_BUFFER_BYTES if quick else _CUDA_BUFFER_BYTES
            source = torch.rand(size // 4, device=device)
            target = torch.empty_like(source)
            self.bytes = 2 * size
            self.contenders = [Contender("copy", lambda: target.copy_(source))]
        else:
            size = _QUICK_BUFFER_BYTES if quick else _CPU_BUFFER_BYTES
            size = max(size, 0 if quick else 4 * largest_cache_bytes())
            data = torch.rand(size // 4)
            self.bytes = data.numel() * 4
            self.contenders = [
                Contender("read_native", lambda: _native.read_all(data)),
                Contender("read_torch", data.sum),
            ]

    def per_round(self, times: dict[str, list[float]]) -> list[float]:
        """Bytes per second in every round, by the contender that is faster over all rounds.

        The better of two measurements in each round would be biased upwards by their noise.
        """
        rows = [times[contender.name] for contender in self.contenders]
        return [self.bytes / seconds for seconds in min(rows, key=statistics.median)]
