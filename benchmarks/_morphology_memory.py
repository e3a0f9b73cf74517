"""Peak memory of a forward and backward pass, beyond the input and the incoming gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch

from benchmarks._memory import Memory, MemoryRunError, peak_of_call, run_worker
from benchmarks._morphology_cases import MemoryCase, Work
from benchmarks._morphology_contenders import DPFAST, PEERS, LeftOutError, dpfast_peer
from benchmarks._record import failure

__all__ = ["in_fresh_process", "peak", "run_memory_case"]

_SMALL_EXTENT = 8


def _backward(case: MemoryCase, work: Work) -> Callable[[], torch.Tensor]:
    peer = dpfast_peer(work) if case.contender == DPFAST else PEERS[case.contender](work)
    if peer.backward is None:
        raise LeftOutError(f"{case.contender} has no gradient")
    return peer.backward


def peak(case: MemoryCase, device: torch.device) -> Memory:
    """Peak memory of a pass, in this process; one on a small input comes first."""
    shape = (1, case.case.shape[1], *[_SMALL_EXTENT] * case.case.axes)
    _backward(case, Work(replace(case.case, shape=shape), device))()
    return peak_of_call(_backward(case, Work(case.case, device)), device)


def in_fresh_process(case: MemoryCase) -> Memory:
    """`peak` on the CPU, in a process of its own.

    Raises:
      MemoryRunError: the process failed.
    """
    request = {"case": asdict(case.case), "contender": case.contender}
    return run_worker("benchmarks._morphology_worker", request)


def run_memory_case(case: MemoryCase, device: torch.device) -> dict[str, Any]:
    """Measure a row; with "failed" where a peer does not come to an end."""
    row: dict[str, Any] = {"contender": case.contender, "case": asdict(case.case)}
    try:
        memory = in_fresh_process(case) if device.type == "cpu" else peak(case, device)
    except Exception as error:  # whatever a peer raises is what is to be told
        if case.contender == DPFAST:
            raise
        row["failed"] = str(error) if isinstance(error, MemoryRunError) else failure(error)
        return row
    row["memory"] = asdict(memory)
    row["memory_over_input"] = memory.bytes / case.case.bytes
    return row
