"""What a 3D U-Net of 31 million parameters at 1,000 sites would cost, worked out on paper.

    python -m benchmarks large_federation        # docs/large_federation.md

Operations are counted on a network without data, epsilons computed by the accountant, and the
server's work on one reply is measured on this machine. All else is arithmetic on the assumptions
that the page names: nobody has run such a federation.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks._record import ROOT, device_name
from dpfast.federated.flower.arrays import to_arrays, to_weights
from dpfast.federated.strategies import RunningMean
from dpfast.federated.weights import digest, problem_with
from dpfast.privacy import accounting
from dpfast.privacy.accounting import TrainingStep

__all__ = ["main", "render"]

PAGE = ROOT / "docs" / "large_federation.md"
_FILTERS = (32, 64, 128, 256, 320, 320)  # nnU-Net's full-resolution network
_PATCH = 128
_BATCH = 2
_SITES = 1000
_PATIENTS = 200  # a site
_ROUNDS = 500
_LOCAL_STEPS = 10
_DELTA = 1e-5
_REPEATS = 5
# Assumptions: published peak figures of an H100 SXM, and the share of them that is reached.
_H100_FLOPS, _REACHED, _H100_BANDWIDTH = 495e12, 0.3, 3.35e12
_SITE_LINK, _SERVER_LINK = 1e9 / 8, 10e9 / 8  # bytes a second: 1 and 10 Gbit/s


def _network() -> torch.nn.Module:
    from monai.networks.nets.dynunet import DynUNet

    steps = (1, 2, 2, 2, 2, 2)
    return DynUNet(3, 1, 3, (3,) * 6, steps, steps[1:], filters=_FILTERS)


def _count() -> tuple[int, int]:
    """Parameters, and operations of a forward pass of one patch."""
    with torch.device("meta"), torch.no_grad():
        network = _network()
        patch = torch.empty(1, 1, _PATCH, _PATCH, _PATCH)
        with FlopCounterMode(display=False) as counter:
            network(patch)
    return sum(p.numel() for p in network.parameters()), counter.get_total_flops()


def _median(call: Callable[[], object]) -> float:
    times = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _server_seconds(parameters: int) -> dict[str, float]:
    """What each part of a reply's way costs the server, measured."""
    generator = np.random.default_rng(0)
    weights = {"weights": generator.standard_normal(parameters, dtype=np.float32)}
    message, mean = to_arrays(weights), RunningMean()
    mean.add(weights, 1.0)
    return {
        "unpack": _median(lambda: to_weights(message)),
        "check shapes and numbers": _median(lambda: problem_with(weights, weights)),
        "add to the mean": _median(lambda: mean.add(weights, 1.0)),
        "digest, once a round": _median(lambda: digest(weights)),
    }


def _epsilon(noise_multiplier: float, rate: float, units: int, steps: int) -> float:
    step = TrainingStep(noise_multiplier, rate, units)
    return accounting.epsilon([(step.event(), steps)], _DELTA)


def _time(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{1e6 * seconds:.0f} µs"
    if seconds < 1.0:
        return f"{1e3 * seconds:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 600 else f"{seconds / 3600:.1f} h"


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(each) + " |" for each in lines)


def _site(parameters: int, forward: int) -> str:
    step = 3 * forward * _BATCH
    seconds = step / (_H100_FLOPS * _REACHED)
    kept = 4 * parameters * _BATCH
    release = (kept + 4 * parameters) / _H100_BANDWIDTH
    return _table(
        ["a site's step", "figure", "from"],
        [
            ["forward pass of a patch", f"{forward / 1e12:.2f} TFLOP", "counted"],
            ["ordinary step", f"{step / 1e12:.1f} TFLOP", f"3 forward passes, {_BATCH} patches"],
            ["its time", _time(seconds), f"{_REACHED:.0%} of 495 TFLOP/s (TF32): an assumption"],
            ["per-sample gradients, kept", _bytes(kept), "B P in float32"],
            ["formed and dropped (`memory_budget`)", _bytes(4 * parameters), "P in float32"],
            [
                "clip_and_noise, norms from the backward pass",
                _time(release),
                "B P read, P written at 3.35 TB/s",
            ],
            ["its share of the step", f"{release / seconds:.2%}", "the two above"],
            [
                "local steps of a round",
                _time(_LOCAL_STEPS * seconds),
                f"{_LOCAL_STEPS} of them, evaluation not counted",
            ],
        ],
    )


def _server(parameters: int, measured: dict[str, float]) -> str:
    weights = 4 * parameters
    a_reply = sum(t for name, t in measured.items() if "once" not in name)
    rows = [
        ["weights", _bytes(weights), "P in float32"],
        ["to and from a site, each round", _bytes(2 * weights), "2 P"],
        ["that over a site's link", _time(2 * weights / _SITE_LINK), "1 Gbit/s: an assumption"],
        ["in and out of the server, each round", _bytes(2 * weights * _SITES), "1,000 sites"],
        [
            "that over the server's link",
            _time(2 * weights * _SITES / _SERVER_LINK),
            "10 Gbit/s: an assumption",
        ],
        *([name, _time(seconds), "measured"] for name, seconds in measured.items()),
        ["all replies of a round", _time(_SITES * a_reply), "1,000 of them, one after the other"],
        [
            "memory: FedAvg and what begins with a mean",
            _bytes(weights * (1 + 2 + 1)),
            "weights, sum in float64, one reply",
        ],
        ["memory: median, Krum, Bulyan", _bytes(weights * _SITES), "all replies at once"],
        ["checkpoint", _bytes(weights), "weights; with FedAdam three times as much"],
    ]
    return _table(["the server", "figure", "from"], rows)


def _privacy(parameters: int) -> str:
    rate, steps = _BATCH / _PATIENTS, _ROUNDS * _LOCAL_STEPS
    rows = []
    for multiplier in (0.6, 0.8, 1.0, 2.0):
        noise = multiplier * math.sqrt(parameters) / _BATCH
        rows.append(
            [
                f"{multiplier:.1f}",
                f"{_epsilon(multiplier, rate, _PATIENTS, steps):.2f}",
                f"{noise:,.0f}",
                f"{noise / math.sqrt(_SITES):,.0f}",
            ]
        )
    return _table(
        [
            "noise multiplier",
            "ε of each site's patients",
            "noise in a step's mean gradient, over C",
            "the same in the mean of 1,000 sites",
        ],
        rows,
    )


def _whole_sites(parameters: int) -> str:
    rows = []
    for rate in (0.05, 0.1, 1.0):
        noise = math.sqrt(parameters) / (rate * _SITES)
        rows.append(
            [
                f"{rate:.0%}",
                f"{_epsilon(1.0, rate, _SITES, _ROUNDS):.2f}",
                f"{noise:.1f}",
            ]
        )
    return _table(
        ["sites asked in a round", "ε of a whole site, z = 1", "noise in the mean update, over S"],
        rows,
    )


def render(parameters: int, forward: int, measured: dict[str, float], machine: str) -> str:
    """The page.

    Args:
      parameters: of the network.
      forward: operations of a forward pass of one patch.
      measured: seconds of the server's work on a reply.
      machine: where they were measured.
    """
    channels = ", ".join(map(str, _FILTERS))
    return f"""\
# A large federation, worked out

Written by `python -m benchmarks large_federation`. Do not edit. **Nobody has run this.** Operations
are counted, epsilons computed, and the server's work on a reply is measured ({machine}); times on a
GPU and on networks follow from the assumptions in the tables.

A 3D U-Net of {parameters / 1e6:.1f} million parameters (DynUNet with {channels} channels),
patches of {_PATCH}³, {_BATCH} a step; {_SITES:,} sites of {_PATIENTS} patients, {_ROUNDS} rounds of
{_LOCAL_STEPS} local steps.

## At a site

{_site(parameters, forward)}

So what privacy adds at a site is not arithmetic but memory, and that has a bound: with a budget no
more than one layer's gradients exist at a time.

## At the server

{_server(parameters, measured)}

The links are the limit, not the server's processor: what would help is fewer rounds, half precision
on the way, or a tree of servers that pass on means. Sites are asked all at once in a deployment, so
the slowest one's steps and link set the pace.

## Privacy

ε at δ = {_DELTA} about adding or removing one patient, for each site by itself (and for the
federation where no patient is at two sites): sample rate {_BATCH / _PATIENTS:.0%},
{_ROUNDS * _LOCAL_STEPS:,} steps, PLD.

{_privacy(parameters)}

A clipped gradient has at most the norm 1 in these units. One site's step drowns in its noise; the
mean over {_SITES:,} sites has √{_SITES:,} ≈ {math.sqrt(_SITES):.0f} times less. That is what a
federation of many sites gains: each keeps its own guarantee, and the noise averages out. What is
left still drowns a step, though not the sum of hundreds. It falls with B (ε rises with
B / {_PATIENTS}) and with the square root of the number of parameters: batches of dozens of
patients, and training fewer parameters, are worth more here than any kernel.

Protecting whole sites instead (DP-FedAvg, by a server that all trust), {_ROUNDS} rounds:

{_whole_sites(parameters)}

An update has at most the norm 1 in these units. So {_SITES:,} hospitals are still few for this
promise on a network of this size; its noise falls with their number, where that of the patients'
own promise falls with its square root.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks large_federation")
    parser.parse_args(argv)
    parameters, forward = _count()
    machine = device_name(torch.device("cpu"))
    PAGE.write_text(render(parameters, forward, _server_seconds(parameters), machine))
    return 0
