"""`dpfast doctor`: what this installation is, and whether each kernel equals its twin.

This is the one production module that may import dpfast.reference: checking against it is its job.
"""

from __future__ import annotations

import itertools
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
import typer
from rich.console import Console
from rich.table import Table

from dpfast import NoiseSource, _native, clip_and_noise, morphology, reference
from dpfast.ops._precision import full_float32
from dpfast.ops.conv_grad_sample import ConvSettings, conv_grad_sample, conv_square_norms
from dpfast.ops.ghost_norms import ghost_square_norms

__all__ = ["Check", "doctor", "run_checks"]

_RULES = ("flat", "automatic", "auto_v", "normalized", "psac", "none")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_ROWS, _SHAPES = 9, ((33, 17), (257,), (4099,))
# float32 outputs are rounded once (2^-24); the norm margin shrinks every weight by 2^-28.
_TOLERANCE = {True: 2.0**-26, False: 2.0**-22}


@dataclass(frozen=True)
class Check:
    """One self-test: its name, whether it passed, and the error against the twin or the reason."""

    name: str
    passed: bool
    detail: str


def _grads(dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(20)
    grads = [torch.randn(_ROWS, *shape, generator=generator) for shape in _SHAPES]
    grads[0][2] = float("nan")
    grads[1][4] = 0.0
    return [grad.to(dtype).to(device) for grad in grads]


def _relative_error(got: Sequence[torch.Tensor], want: list[torch.Tensor]) -> float:
    size = max(float(w.abs().max()) for w in want)
    return max(
        float((g.cpu().double() - w).abs().max()) for g, w in zip(got, want, strict=True)
    ) / max(size, 1e-300)


def _clip_checks(device: torch.device) -> Iterator[Check]:
    for rule, dtype, norm in itertools.product(_RULES, _DTYPES, ("l2", "l1")):
        grads = _grads(dtype, device)
        got = clip_and_noise(
            grads, max_grad_norm=1.0, noise_multiplier=0.0, clipping=rule, norm=norm
        )
        want = reference.clip_and_noise(
            [g.cpu() for g in grads],
            max_grad_norm=1.0,
            noise_multiplier=0.0,
            clipping=rule,
            norm=norm,
        ).out
        error = _relative_error(got, want)
        name = f"clip_and_noise {rule} {norm} {str(dtype).removeprefix('torch.')} {device.type}"
        yield Check(name, error <= _TOLERANCE[dtype == torch.float64], f"error {error:.1e}")


def _noise_checks(device: torch.device) -> Iterator[Check]:
    key, count = bytes(range(32)), 4096
    words = [int.from_bytes(key[i : i + 4], "little") for i in range(0, 32, 4)]
    for mechanism, dtype in itertools.product(
        ("gaussian", "laplace"), (torch.float32, torch.float64)
    ):
        name = f"noise {mechanism} {str(dtype).removeprefix('torch.')} {device.type}"
        if device.type == "cpu":
            got = _native.fill_noise(words, 3, 1, mechanism, count, dtype=dtype)
            want = reference.standard_noise(
                key, 3, 1, mechanism, count, double_precision=dtype == torch.float64
            )
            error = _relative_error([got], [want])
            limit = 1e-12 if dtype == torch.float64 else 1e-6
            yield Check(name, error <= limit, f"error {error:.1e}")
        else:
            zeros = torch.zeros(1, count, dtype=dtype)
            both = [
                clip_and_noise(
                    zeros.to(where),
                    max_grad_norm=1.0,
                    noise_multiplier=1.0,
                    mechanism=mechanism,
                    noise=NoiseSource(seed=7),
                ).cpu()
                for where in ("cpu", device)
            ]
            error = _relative_error([both[1]], [both[0].double()])
            exact = dtype == torch.float32
            yield Check(name, error <= (0.0 if exact else 1e-12), f"against CPU {error:.1e}")


def _conv_checks(device: torch.device) -> Iterator[Check]:
    generator = torch.Generator().manual_seed(0)
    for transposed, shape in itertools.product((False, True), ((9, 7), (5, 4, 6))):
        axes = len(shape)
        conv = ConvSettings([2] * axes, [1] * axes, [1] * axes, transposed, [0] * axes, 1)
        x = torch.randn(3, 5, *shape, generator=generator)
        weight = torch.empty(*((5, 18) if transposed else (18, 5)), *[3] * axes)
        grad = torch.randn(torch.convolution(x, weight, None, *conv).shape, generator=generator)
        truth = reference.conv_weight_grad_sample(
            x,
            grad,
            weight.shape,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            transposed=transposed,
            groups=1,
        )
        squares = truth.square().flatten(1).sum(1)
        on_device = x.to(device), grad.to(device)
        name = f"conv{'_transpose' if transposed else ''}{axes}d"
        with full_float32(device):
            found = conv_grad_sample(*on_device, weight.shape, conv)
        anchor, moving = on_device if transposed else on_device[::-1]
        ghosts = ghost_square_norms(
            anchor,
            moving,
            kernel=weight.shape[2:],
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
        )
        for what, got, want, limit in (
            ("gradients", found.weight, truth, 1e-5),
            ("norms", conv_square_norms(*on_device, weight.shape, conv), squares, 1e-5),
            ("ghost norms", ghosts, squares, 1e-10),
        ):
            error = _relative_error([got.cpu()], [want])
            yield Check(f"{name} {what} {device.type}", error <= limit, f"error {error:.1e}")


def _prelu_checks(device: torch.device) -> Iterator[Check]:
    if device.type != "cpu":  # PyTorch's kernel runs there
        return
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, 2, 3, 1000, generator=generator)
    slopes = torch.tensor([0.25, -0.5, 1.5])
    negative = x.double() * (x <= 0)
    got = _native.prelu_grad(x, grad, slopes)
    want_x = torch.where(x > 0, grad.double(), grad * slopes.double()[:, None])
    error = _relative_error(got, [want_x, (negative * grad).sum(2)])
    yield Check("prelu cpu", error <= 1e-5, f"error {error:.1e}")


def _morphology_checks(device: torch.device) -> Iterator[Check]:
    generator = torch.Generator().manual_seed(0)
    boxes = {2: torch.ones(3, 4, dtype=torch.bool), 3: torch.ones(2, 3, 5, dtype=torch.bool)}
    for operation, axes in itertools.product(morphology.OPERATIONS, (2, 3)):
        shape = (9, 21) if axes == 2 else (5, 6, 11)
        x, grad = torch.randn(2, 2, 3, *shape, generator=generator)
        x[0, 0, 0, 0] = x[0, 1, -1] = 0.5  # ties
        errors = [0.0]
        for border, footprint in itertools.product(
            ("geodesic", "reflect"), (boxes[axes], morphology.ellipse(5, spatial_dims=axes))
        ):
            want, chains = reference.morphology(x, operation, footprint, border=border)
            traced = x.detach().clone().to(device).requires_grad_()
            got = morphology.apply(traced, operation, footprint=footprint, border=border)
            (found,) = torch.autograd.grad(got, traced, grad.to(device))
            routed = torch.zeros_like(want).flatten(2)
            for sign, _, source in chains:
                routed.scatter_add_(2, source.flatten(2), sign * grad.double().flatten(2))
            wanted = [want, routed.view_as(want)]
            errors.append(_relative_error([got.detach(), found], wanted))
        error = max(errors)
        yield Check(f"{operation} {axes}d {device.type}", error <= 1e-6, f"error {error:.1e}")


def _rfc8439() -> Check:
    # RFC 8439, section 2.3.2.
    key = [int.from_bytes(bytes(range(i, i + 4)), "little") for i in range(0, 32, 4)]
    words = _native.chacha20_block(key, 1, [0x09000000, 0x4A000000, 0])
    passed = words[0] == 0xE4E7F110 and words[15] == 0x4E3C50A2
    return Check("ChaCha20 RFC 8439", passed, "section 2.3.2 vector")


def _guarded(
    checks: Callable[[torch.device], Iterator[Check]], device: torch.device
) -> list[Check]:
    try:
        return list(checks(device))
    except RuntimeError as error:
        return [Check(f"{checks.__name__} {device}", False, str(error))]


_CHECKS = (_clip_checks, _noise_checks, _conv_checks, _prelu_checks, _morphology_checks)


def run_checks() -> list[Check]:
    """Every kernel against its float64 twin, on the CPU and, where it can run, on CUDA."""
    devices = [torch.device("cpu")]
    if _native.has_cuda_kernels() and torch.cuda.is_available():
        devices.append(torch.device("cuda", torch.cuda.current_device()))
    results = [_rfc8439()]
    for device in devices:
        for checks in _CHECKS:
            results += _guarded(checks, device)
    return results


def _facts() -> dict[str, str]:
    info = _native.build_info()
    if info["cuda_toolkit"] is None:
        kernels = "not built (no CUDA compiler was found, or DPFAST_CUDA=OFF)"
    else:
        kernels = f"toolkit {info['cuda_toolkit']}, architectures {info['cuda_architectures']}"
    if torch.cuda.is_available():
        device = f"{torch.cuda.get_device_name()}, driver CUDA {_native.cuda_driver_version()}"
    elif torch.version.cuda is None:
        device = "none: this Torch is built without CUDA"
    else:
        device = "none: no CUDA device is visible to Torch"
    return {
        "dpfast": str(info["version"]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "instruction set": str(info["instruction_set"]),
        "CUDA kernels": kernels,
        "CUDA device": device,
    }


def doctor(
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Versions, instruction set, CUDA state, and every kernel against its twin."""
    facts, checks = _facts(), run_checks()
    failed = [check for check in checks if not check.passed]
    if as_json:
        typer.echo(json.dumps({"facts": facts, "checks": [asdict(c) for c in checks]}, indent=2))
    else:
        table = Table(show_header=False, title="dpfast doctor")
        for name, value in facts.items():
            table.add_row(name, value)
        for check in failed:
            table.add_row(f"[red]{check.name}", f"[red]failed: {check.detail}")
        table.add_row("kernels", f"{len(checks) - len(failed)} of {len(checks)} checks passed")
        Console().print(table)
    if failed:
        raise typer.Exit(code=1)
