"""Weak scaling of data-parallel training: twice the processes, twice the batch, the same time?

Two processes stay alive for a whole row and take their turns as they are told:

alone: the first one trains by itself, the second waits;
apart: both train, each by itself. What is lost here the machine takes: caches, memory, clock;
together: both train one model.

Every turn takes so many steps on a batch of the same expected size per process. The efficiency is
the samples that all processes trained on per second, over so many times those of one alone. A
private step is that of `PrivacyEngine`, ledger on the disk and Poisson batches included; an
ordinary one that of `DistributedDataParallel`. On the CPU a process has its share of the cores as
threads and talks by gloo, on CUDA a GPU of its own and NCCL.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks._networks import NETWORKS, QUICK_NETWORKS
from benchmarks._record import ROOT
from benchmarks._timing import summarise

__all__ = ["CONTENDERS", "MODES", "OP", "PROCESSES", "Case", "Settings", "cases", "run"]

OP = "scaling"
PROCESSES = 2
MODES = ("alone", "apart", "together")
CONTENDERS = ("dpfast", "ordinary")
_WORKER = "benchmarks._scaling_worker"
_ROUNDS = 9
_STEPS = 5
_NETWORKS = ("UNet 2D", "UNet 3D")  # others take minutes a round on one thread
_GRACE_SECONDS = 10.0


@dataclass(frozen=True)
class Case:
    """What a row trains.

    Attributes:
      network: of `_networks`.
      batch_size: of each process; of private steps the expected one.
      size: extent of an image.
      steps: in a turn.
    """

    network: str
    batch_size: int
    size: tuple[int, ...]
    steps: int = _STEPS

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Case:
        """The case that was saved: JSON turns tuples into lists."""
        return cls(**{**fields, "size": tuple(fields["size"])})

    @property
    def label(self) -> str:
        """The row in words."""
        shape = "x".join(str(extent) for extent in (self.batch_size, 1, *self.size))
        return f"{self.network}, {shape} a process"


@dataclass(frozen=True)
class Settings:
    """How much to measure.

    Attributes:
      quick: a tiny network, to try it out.
      rounds: at most so many rounds a row.
    """

    quick: bool = False
    rounds: int = _ROUNDS


def cases(device_type: str, *, quick: bool) -> list[Case]:
    """The rows: an image and a volume network with targets."""
    networks = QUICK_NETWORKS[:1] if quick else [n for n in NETWORKS if n.name in _NETWORKS]
    found = []
    for network in networks:
        sizes = network.cpu if device_type == "cpu" else network.cuda
        if sizes is not None:
            found.append(Case(network.name, *sizes, steps=2 if quick else _STEPS))
    return found


class _Worker:
    """One of the processes; answers a line with a line."""

    def __init__(self, request: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", _WORKER, json.dumps(request)],
            cwd=ROOT,
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def tell(self, message: Mapping[str, str]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"scaling: a process ended with status {self._process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def stop(self) -> None:
        with self._process as process:  # closes its pipes
            assert process.stdin is not None
            with suppress(BrokenPipeError):
                process.stdin.close()
            try:
                process.wait(_GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


@contextmanager
def _workers(case: Case, device: torch.device) -> Iterator[list[_Worker]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threads = max(1, torch.get_num_threads() // PROCESSES)
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(PROCESSES),
        "OMP_NUM_THREADS": str(threads),
    }
    with tempfile.TemporaryDirectory() as scratch:
        request = {"case": asdict(case), "device": device.type, "folder": scratch}
        workers: list[_Worker] = []
        try:
            for rank in range(PROCESSES):
                workers.append(_Worker(request, {**environment, "RANK": str(rank)}))
            for worker in workers:
                worker.hear()
            yield workers
        finally:
            for worker in workers:
                worker.stop()


def _turn(workers: Sequence[_Worker], contender: str, mode: str) -> float:
    """Samples a second, of all processes that train."""
    taking = workers[:1] if mode == "alone" else workers
    for worker in taking:
        worker.tell({"contender": contender, "mode": mode})
    found = [worker.hear() for worker in taking]
    if mode == "together" and len({each["digest"] for each in found}) > 1:
        raise RuntimeError(f"scaling: {contender}: the processes' weights are not the same")
    if mode == "apart":
        return float(sum(each["samples"] / each["seconds"] for each in found))
    return float(sum(each["samples"] for each in found) / max(each["seconds"] for each in found))


def run_case(case: Case, device: torch.device, rounds: int) -> dict[str, Any]:
    """Measure one row.

    Raises:
      RuntimeError: a process failed, or the processes do not agree on the weights.
    """
    rates: dict[str, dict[str, list[float]]] = {
        contender: {mode: [] for mode in MODES} for contender in CONTENDERS
    }
    with _workers(case, device) as workers:
        for number in range(-1, rounds):  # the first round warms up
            for contender in CONTENDERS:
                for mode in MODES:
                    rate = _turn(workers, contender, mode)
                    if number >= 0:
                        rates[contender][mode].append(rate)
    row: dict[str, Any] = {"case": asdict(case), "contenders": {}}
    for contender, found in rates.items():
        efficiency = {
            mode: [
                rate / PROCESSES / alone
                for rate, alone in zip(found[mode], found["alone"], strict=True)
            ]
            for mode in ("apart", "together")
        }
        row["contenders"][contender] = {
            "samples_per_second": {mode: asdict(summarise(each)) for mode, each in found.items()},
            "efficiency": {mode: asdict(summarise(each)) for mode, each in efficiency.items()},
            "together_over_apart": statistics.median(
                one / other for one, other in zip(found["together"], found["apart"], strict=True)
            ),
        }
    return row


def run(
    device: torch.device, settings: Settings, on_row: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """Measure all rows.

    Args:
      device: CPU or CUDA.
      settings: how much to measure.
      on_row: called before each row with its description, its number from 0 and the number of rows.

    Returns:
      What is saved, without the description of the machine; no rows where there are too few GPUs.
    """
    chosen = cases(device.type, quick=settings.quick)
    if device.type == "cuda" and torch.cuda.device_count() < PROCESSES:
        chosen = []
    rounds = 2 if settings.quick else min(settings.rounds, _ROUNDS)
    rows = []
    for number, case in enumerate(chosen):
        on_row(case.label, number, len(chosen))
        rows.append(run_case(case, device, rounds))
    return {"op": OP, "quick": settings.quick, "processes": PROCESSES, "rows": rows}
