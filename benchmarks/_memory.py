"""Peak memory of a step or another call, above what was held before it.

glibc keeps freed memory for later and splits it up. How much differs from process to process: with
its defaults the peak of one and the same step varied by 15 %, a fixed threshold above which memory
comes from the system and goes back to it makes the peak repeatable within 0.2 %.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks._record import ROOT
from benchmarks._step_task import Case, Step

__all__ = [
    "Memory",
    "MemoryRunError",
    "in_fresh_process",
    "peak",
    "peak_of_call",
    "run_worker",
]

_CALLS = 3
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # see proc(5)
_WORKER_SECONDS = 600.0
_SETTINGS = {
    "MALLOC_MMAP_THRESHOLD_": str(2**16),
    # Several processes share the cores: a thread gives its core up while it waits for others.
    "OMP_WAIT_POLICY": "passive",
}

Method = Literal["VmHWM", "ru_maxrss", "max_memory_allocated"]


class MemoryRunError(RuntimeError):
    """A contender's process did not come to an end; the message is what it ended with."""


@dataclass(frozen=True)
class Memory:
    """What a call takes.

    Attributes:
      bytes: peak over some calls minus the base line.
      base_bytes: held before: libraries, network, inputs, and CUDA's allocations.
      method: where the peak was read. `ru_maxrss` includes the peak of starting up.
    """

    bytes: int
    base_bytes: int
    method: Method


def _from_status(field: str) -> int:
    """A figure of this process in bytes, 0 where the system does not tell."""
    try:
        match = re.search(rf"^{field}:\s*(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(match.group(1)) * 1024 if match else 0


def _give_back() -> None:
    """Return freed memory to the system, where the C library can."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _reset_peak() -> bool:
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def peak(step: Step) -> Memory:
    """Peak memory of a step.

    On the CPU the process must be a fresh one, whose allocator holds nothing that could be used
    again. A step on one sample comes first: it loads libraries and sets up their state.

    Args:
      step: not run before.
    """
    step.run(step.task.batch.rows(0, 1))
    step.zero_grad()
    return peak_of_call(lambda: step.run(step.task.batch), step.task.device)


def peak_of_call(
    call: Callable[[], object], device: torch.device, *, calls: int = _CALLS
) -> Memory:
    """Peak memory of a call, whose like has run before on less, as in `peak`."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize()
        base = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(calls):
            call()
        most = torch.cuda.max_memory_allocated()
        return Memory(most - base, base, "max_memory_allocated")
    _give_back()
    base = _from_status("VmRSS")
    method: Method = "VmHWM"
    if not (base and _reset_peak()):
        base, method = _maxrss(), "ru_maxrss"
    for _ in range(calls):
        call()
    most = _maxrss() if method == "ru_maxrss" else _from_status("VmHWM")
    return Memory(most - base, base, method)


def _maxrss() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def in_fresh_process(case: Case, contender: str) -> Memory:
    """`peak` of a contender on the CPU, in a process of its own.

    Args:
      case: the row.
      contender: its name in `_step_contenders.STEPS`.

    Raises:
      MemoryRunError: the process failed.
    """
    return run_worker("benchmarks._memory_worker", {"case": asdict(case), "contender": contender})


def run_worker(module: str, request: dict[str, Any]) -> Memory:
    """What a worker measures in a process of its own.

    Args:
      module: the worker; prints `Memory`, or its failure, as its last line.
      request: what it is told, besides the number of threads.

    Raises:
      MemoryRunError: the process failed.
    """
    request = {**request, "threads": torch.get_num_threads()}
    try:
        done = subprocess.run(
            [sys.executable, "-m", module, json.dumps(request)],
            cwd=ROOT,
            env={**_SETTINGS, **os.environ},
            capture_output=True,
            text=True,
            timeout=_WORKER_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise MemoryRunError(f"no end after {_WORKER_SECONDS:.0f} s") from None
    if done.returncode < 0:
        raise MemoryRunError(f"killed by signal {-done.returncode}")
    if done.returncode > 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise MemoryRunError(lines[-1])
    found = json.loads(done.stdout.splitlines()[-1])
    if "failure" in found:
        raise MemoryRunError(found["failure"])
    return Memory(**found)
