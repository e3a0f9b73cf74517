"""What the machine's memory gives: the floor that the ops are measured against."""

from __future__ import annotations

import statistics

import torch

from benchmarks._timing import Contender, clock_for, largest_cache_bytes, measure
from dpfast import _native

__all__ = ["Bandwidth"]

_CPU_BUFFER_BYTES = 512 * 2**20
_CUDA_BUFFER_BYTES = 2**30
_QUICK_BUFFER_BYTES = 64 * 2**20
_TRIAL_ROUNDS = 15


class Bandwidth:
    """A contender that streams a buffer much larger than any cache.

    On the CPU a read, by dpfast's native read-everything kernel or by torch.sum, whichever a trial
    found faster, with the same number of threads. On CUDA a copy within the device, counting bytes
    read and written.

    Args:
      device: where.
      quick: use a small buffer, for trying out the harness; its figures mean nothing.

    Attributes:
      contender: the faster way.
      bytes: what one call of it moves.
    """

    def __init__(self, device: torch.device, *, quick: bool) -> None:
        if device.type == "cuda":
            size = _QUICK_BUFFER_BYTES if quick else _CUDA_BUFFER_BYTES
            source = torch.rand(size // 4, device=device)
            target = torch.empty_like(source)
            self.bytes = 2 * size
            self.contender = Contender("copy", lambda: target.copy_(source))
            return
        size = _QUICK_BUFFER_BYTES if quick else _CPU_BUFFER_BYTES
        size = max(size, 0 if quick else 4 * largest_cache_bytes())
        data = torch.rand(size // 4)
        self.bytes = data.numel() * 4
        ways = [
            Contender("read_native", lambda: _native.read_all(data)),
            Contender("read_torch", data.sum),
        ]
        rounds = 1 if quick else _TRIAL_ROUNDS
        trial = measure(ways, clock_for(device), rounds=rounds, budget_seconds=60.0).seconds
        self.contender = min(ways, key=lambda way: statistics.median(trial[way.name]))
