"""The benchmark of `dpfast.clip_and_noise`.

Every row times, in turn and on the same random gradients: dpfast with and without noise, into
given outputs and into new ones; the same in PyTorch's ops; Opacus; and the machine's memory. The
floor of a row is the time to move its bytes (the gradients twice, once with given norms, and the
output once) at the bandwidth that memory gave right before and after; `share_of_bandwidth` is the
floor over dpfast's time. It can exceed 1 where the gradients fit in a cache.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from benchmarks._answers import check_noise, check_sum, tolerance_of
from benchmarks._bandwidth import Bandwidth
from benchmarks._opacus import OpacusStep
from benchmarks._opacus import reason_to_skip as opacus_reason_to_skip
from benchmarks._pytorch import PytorchOps
from benchmarks._record import available_bytes
from benchmarks._timing import (
    Contender,
    Ratio,
    Times,
    capture,
    clock_for,
    measure,
    ratio,
    summarise,
)
from benchmarks._workload import MAX_GRAD_NORM, NOISE_MULTIPLIER, Case, Workload
from dpfast import _native, clip_and_noise

__all__ = ["OP", "Settings", "cases", "run", "run_case"]

OP = "clip_and_noise"

_BATCH_SIZES = (16, 64)
_MEBIBYTES = {"cpu": (1, 8, 64, 512, 2048), "cuda": (1, 8, 64, 512, 2048, 8192)}
_NOISE_COUNT = 2**18  # one MiB of float32: stays in a core's cache


@dataclass(frozen=True)
class Settings:
    """How much to measure.

    Attributes:
      quick: a few small rows, for trying out the harness; its figures mean nothing.
      rounds: at most so many rounds a row.
      budget_seconds: time for the rounds of one row; at least five rounds are taken.
    """

    quick: bool = False
    rounds: int = 25
    budget_seconds: float = 30.0


def cases(device_type: str, *, quick: bool) -> list[Case]:
    """The rows for a kind of device."""
    if quick:
        return [
            Case(1, 16),
            Case(1, 64, num_tensors=30),
            Case(1, 16, dtype="bfloat16"),
            Case(1, 16, given_norms=True),
            Case(1, 16, rows_per_unit=4),
            Case(1, 16, rule="automatic"),
            Case(1, 16, mechanism="laplace"),
        ]
    rows = [Case(size, batch) for size in _MEBIBYTES[device_type] for batch in _BATCH_SIZES]
    rows += [
        Case(size, batch, num_tensors=count)
        for size in (64, 512)
        for count in (30, 300)
        for batch in _BATCH_SIZES
    ]
    for batch in _BATCH_SIZES:
        rows += [
            Case(512, batch, dtype="bfloat16"),
            Case(512, batch, given_norms=True),
            Case(512, batch, rows_per_unit=4),
            Case(512, batch, rule="automatic"),
            Case(512, batch, mechanism="laplace"),
        ]
    return rows


def _dpfast(
    work: Workload, *, noisy: bool = True, out: list[torch.Tensor] | None = None
) -> Sequence[torch.Tensor]:
    case = work.case
    return clip_and_noise(
        work.grads,
        max_grad_norm=MAX_GRAD_NORM,
        noise_multiplier=NOISE_MULTIPLIER if noisy else 0.0,
        clipping=case.rule,
        mechanism=case.mechanism if noisy else "none",
        # Without noise the norm would go back to L2.
        norm="l1" if case.norm_order == 1 else "l2",
        privacy_unit_ids=work.unit_ids,
        norms=work.norms if case.given_norms else None,
        expected_batch_size=float(work.divisor),
        out=out,
    )


@dataclass(frozen=True)
class _Peer:
    """One way to the answer; `run(noisy)` computes it once, from unused gradients."""

    name: str
    run: Callable[[bool], Sequence[torch.Tensor]]
    contender: Contender


def _run_pytorch(work: Workload, noisy: bool) -> list[torch.Tensor]:
    return PytorchOps(work, NOISE_MULTIPLIER if noisy else 0.0)()


def _run_opacus(work: Workload, noisy: bool) -> list[torch.Tensor]:
    step = OpacusStep(work, NOISE_MULTIPLIER if noisy else 0.0)
    step.reset()
    return step()


def _peers(work: Workload) -> tuple[list[_Peer], dict[str, str]]:
    """Who takes part in a row, dpfast included, and why others do not."""
    peers = [
        _Peer(
            "dpfast",
            lambda noisy: _dpfast(work, noisy=noisy, out=work.out),
            Contender("dpfast", lambda: _dpfast(work, out=work.out)),
        ),
        _Peer("pytorch", partial(_run_pytorch, work), Contender("pytorch", PytorchOps(work))),
    ]
    reason = opacus_reason_to_skip(work.case, available_bytes(work.device))
    if reason is not None:
        return peers, {"opacus": reason}
    step = OpacusStep(work)
    peers.append(_Peer("opacus", partial(_run_opacus, work), Contender("opacus", step, step.reset)))
    return peers, {}


def _check(work: Workload, peers: Sequence[_Peer]) -> dict[str, Any]:
    """Check every peer's answer; raises WrongAnswerError."""
    checks = {}
    scale = NOISE_MULTIPLIER * MAX_GRAD_NORM / work.divisor
    for peer in peers:
        plain = [part.clone() for part in peer.run(False)]
        error = check_sum(work, peer.name, plain)
        noise = [noisy - part for noisy, part in zip(peer.run(True), plain, strict=True)]
        std = check_noise(work.case, noise, scale=scale, contender=peer.name)
        checks[peer.name] = {
            "relative_error": error,
            "tolerance": tolerance_of(peer.name, work.case),
            "noise_std_over_expected": std,
        }
    return checks


def _contenders(work: Workload, peers: Sequence[_Peer]) -> Iterator[Contender]:
    noiseless = partial(_dpfast, work, noisy=False, out=work.out)
    yield from (peer.contender for peer in peers)
    yield Contender("dpfast_noiseless", noiseless)
    yield Contender("dpfast_new_output", partial(_dpfast, work))
    if work.device.type == "cuda":
        for peer in peers:
            # Opacus' bookkeeping on the host cannot be replayed.
            if peer.name != "opacus":
                yield Contender(f"{peer.name}_graph", capture(peer.contender.call))
        yield Contender("dpfast_graph_noiseless", capture(noiseless))


def _ratios(case: Case, times: Times, bandwidth: Bandwidth) -> dict[str, Ratio]:
    """See the module's docstring; a peer's time is compared with dpfast's under equal conditions.

    Opacus returns new tensors, PyTorch's ops write to given ones, and so does dpfast in either
    comparison.
    """
    found = {}

    def share(name: str) -> Ratio:
        floor = [case.floor_bytes / bandwidth.bytes * t for t in times.yardstick[name]]
        return ratio(floor, times.seconds[name])

    for infix in ("", "_graph"):
        name, without = f"dpfast{infix}", f"dpfast{infix}_noiseless"
        if name not in times.seconds:
            continue
        noisy, noiseless = times.seconds[name], times.seconds[without]
        found[f"share_of_bandwidth{infix}"] = share(name)
        found[f"share_of_bandwidth{infix}_noiseless"] = share(without)
        left = ratio(noiseless, noisy)
        found[f"noise_share{infix}"] = Ratio(1 - left.median_of_rounds, 1 - left.of_medians)
        found[f"pytorch{infix}_over_dpfast"] = ratio(times.seconds[f"pytorch{infix}"], noisy)
    if "opacus" in times.seconds:
        found["opacus_over_dpfast"] = ratio(
            times.seconds["opacus"], times.seconds["dpfast_new_output"]
        )
    return found


def run_case(
    case: Case, device: torch.device, bandwidth: Bandwidth, settings: Settings
) -> dict[str, Any]:
    """Measure one row.

    Returns:
      The row as it is saved; with "skipped" and a reason where its gradients do not fit in memory.

    Raises:
      WrongAnswerError: a contender does not compute what it should.
    """
    row: dict[str, Any] = {"case": asdict(case), "bytes_of_gradients": case.grad_bytes}
    row["floor_bytes"] = case.floor_bytes
    available = available_bytes(device)
    if case.working_bytes > available:
        row["skipped"] = (
            f"needs {case.working_bytes / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are left"
        )
        return row
    work = Workload(case, device)
    peers, skipped = _peers(work)
    row["checks"] = _check(work, peers)
    # The answers are known to be right; their memory is wanted for what is timed.
    del work.expected, work.scale
    times = measure(
        list(_contenders(work, peers)),
        clock_for(device),
        rounds=settings.rounds,
        budget_seconds=settings.budget_seconds,
        yardstick=bandwidth.contender,
    )
    row["seconds"] = {name: asdict(summarise(values)) for name, values in times.seconds.items()}
    row["not_measured"] = skipped
    rates = [bandwidth.bytes / t for values in times.yardstick.values() for t in values]
    row["bandwidth_bytes_per_second"] = asdict(summarise(rates))
    row["ratios"] = {name: asdict(value) for name, value in _ratios(case, times, bandwidth).items()}
    return row


def run_noise(settings: Settings) -> list[dict[str, Any]]:
    """Noise alone, on one thread: ChaCha20 samples against torch.randn, in nanoseconds each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        target = torch.empty(_NOISE_COUNT)
        key = list(range(8))
        mechanisms = ("gaussian", "laplace")
        times = measure(
            [
                *(
                    Contender(name, partial(_native.fill_noise, key, 0, 0, name, _NOISE_COUNT))
                    for name in mechanisms
                ),
                Contender("torch_randn", lambda: torch.randn(_NOISE_COUNT, out=target)),
            ],
            clock_for(torch.device("cpu")),
            rounds=settings.rounds,
            budget_seconds=settings.budget_seconds,
        ).seconds
    finally:
        torch.set_num_threads(threads)
    nanoseconds = {
        name: [1e9 * seconds / _NOISE_COUNT for seconds in values] for name, values in times.items()
    }
    return [
        {
            "mechanism": name,
            "samples": _NOISE_COUNT,
            "nanoseconds_per_sample": asdict(summarise(nanoseconds[name])),
            "torch_randn_nanoseconds_per_sample": asdict(summarise(nanoseconds["torch_randn"])),
            "torch_randn_over_dpfast": asdict(ratio(times["torch_randn"], times[name])),
        }
        for name in mechanisms
    ]


def run(
    device: torch.device, settings: Settings, on_row: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """Measure all rows.

    Args:
      device: CPU or CUDA.
      settings: how much to measure.
      on_row: called before each row with its description, its number from 0 and the number of rows.

    Returns:
      What is saved, without the description of the machine.
    """
    chosen = cases(device.type, quick=settings.quick)
    bandwidth = Bandwidth(device, quick=settings.quick)
    rows = []
    for number, case in enumerate(chosen):
        on_row(case.label, number, len(chosen))
        rows.append(run_case(case, device, bandwidth, settings))
        gc.collect()  # captured graphs hold the row's gradients in reference cycles
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return {
        "op": OP,
        "quick": settings.quick,
        "max_grad_norm": MAX_GRAD_NORM,
        "noise_multiplier": NOISE_MULTIPLIER,
        "bandwidth_by": bandwidth.contender.name,
        "rows": rows,
        "noise": run_noise(settings) if device.type == "cpu" else [],
    }
