"""dpfast, OpenCV, max-pool, kornia and SciPy on one input."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from benchmarks._morphology_cases import Work
from benchmarks._record import available_bytes
from dpfast.morphology import PerChannel, apply

__all__ = ["DPFAST", "PEERS", "LeftOutError", "Peer", "dpfast_function", "dpfast_peer", "threads"]

DPFAST = "dpfast"

# Above, a call takes about a second, or minutes.
_SLOW_COMPARISONS = {"cpu": 4e8, "cuda": 1e11}
_MOST_COMPARISONS = {"cpu": 1e10, "cuda": 1e13}
_SLOW_SIZES = (3, 15)  # of contenders that take seconds on the CPU
_KORNIA_COPIES = 3  # of all windows, in a forward and backward pass at its peak

TensorFunction = Callable[[torch.Tensor], torch.Tensor]


class LeftOutError(Exception):
    """A contender takes no part in a row; the message says why."""


@dataclass(frozen=True)
class Peer:
    """One way to the answer.

    Attributes:
      name: key of the results.
      forward: the result, without a gradient.
      backward: result and gradient; returns the gradient. None where there is none.
      slow: a call takes seconds: few rounds are enough.
      border: of what it computes.
    """

    name: str
    forward: Callable[[], torch.Tensor]
    backward: Callable[[], torch.Tensor] | None = None
    slow: bool = False
    border: str = "geodesic"


def _backward(work: Work, function: TensorFunction) -> torch.Tensor:
    leaf = work.x.detach().requires_grad_()
    (found,) = torch.autograd.grad(function(leaf), leaf, work.grad)
    return found


def _differentiable(work: Work, name: str, function: TensorFunction, *, slow: bool = False) -> Peer:
    return Peer(name, partial(function, work.x), partial(_backward, work, function), slow)


def dpfast_function(work: Work, border: str = "geodesic") -> TensorFunction:
    """dpfast, with any border."""
    sizes = work.case.sizes

    def function(x: torch.Tensor) -> torch.Tensor:
        if work.footprint is not None:
            return apply(x, work.case.operation, footprint=work.footprint, border=border)
        if len(sizes) == 1:
            return apply(x, work.case.operation, sizes[0], border=border)
        return apply(x, work.case.operation, PerChannel(*sizes), border=border)

    return function


def dpfast_peer(work: Work) -> Peer:
    """dpfast, as what it is compared with."""
    return _differentiable(work, DPFAST, dpfast_function(work))


def _need_cpu(work: Work, name: str) -> None:
    if work.device.type != "cpu":
        raise LeftOutError(f"{name} is for the CPU")


def _need_float32(work: Work, name: str) -> None:
    if work.case.dtype != "float32":
        raise LeftOutError(f"{name} has no {work.case.dtype}")


def _need_box(work: Work) -> None:
    if work.case.element != "box":
        raise LeftOutError("max-pool has boxes alone")


def _imported(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise LeftOutError(f"{name} is not installed") from None


def _opencv_calls(work: Work) -> tuple[list[Callable[[], object]], torch.Tensor]:
    """A call per plane, and where they write to."""
    name = "OpenCV"
    _need_cpu(work, name)
    _need_float32(work, name)
    if work.case.axes != 2:
        raise LeftOutError(f"{name} has no volumes")
    cv2 = _imported("cv2", name)
    channels = work.case.shape[1]
    sizes = [work.case.size_of(c) for c in range(channels)]
    masks = [torch.ones(size, size) if work.footprint is None else work.footprint for size in sizes]
    elements = itertools.cycle([mask.to(torch.uint8).numpy() for mask in masks])
    operation = {"closing": cv2.MORPH_CLOSE, "dilation": cv2.MORPH_DILATE}[work.case.operation]
    out = torch.empty_like(work.x)
    # Its default border is outside of every maximum and minimum.
    calls: list[Callable[[], object]] = [
        partial(cv2.morphologyEx, plane, operation, element, target)
        for plane, target, element in zip(
            work.x.flatten(0, 1).numpy(), out.flatten(0, 1).numpy(), elements, strict=False
        )
    ]
    return calls, out


def _run_all(calls: list[Callable[[], object]]) -> None:
    for call in calls:
        call()


def _opencv(work: Work) -> Peer:
    calls, out = _opencv_calls(work)

    def forward() -> torch.Tensor:
        _run_all(calls)
        return out

    return Peer("opencv", forward)


def _opencv_pool(work: Work) -> Peer:
    """Planes shared out among threads: within a small plane OpenCV takes only one."""
    calls, out = _opencv_calls(work)
    count = torch.get_num_threads()
    if count == 1:
        raise LeftOutError("there is one thread")
    shares = [calls[start::count] for start in range(count)]
    pool = ThreadPoolExecutor(count)

    def forward() -> torch.Tensor:
        list(pool.map(_run_all, shares))
        return out

    return Peer("opencv_pool", forward)


def _pool(x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    function = F.max_pool2d if len(shape) == 2 else F.max_pool3d
    return function(x, shape, stride=1, padding=tuple(size // 2 for size in shape))


def _pooled(work: Work, x: torch.Tensor, *, by_axis: bool) -> torch.Tensor:
    case = work.case

    def windows(size: int) -> list[tuple[int, ...]]:
        if not by_axis:
            return [(size,) * case.axes]
        return [
            tuple(size if axis == each else 1 for axis in range(case.axes))
            for each in range(case.axes)
        ]

    def whole(part: torch.Tensor, size: int) -> torch.Tensor:
        for dilate in case.stages:
            part = part if dilate else -part
            for shape in windows(size):
                part = _pool(part, shape)
            part = part if dilate else -part
        return part

    if len(case.sizes) == 1:
        return whole(x, case.sizes[0])
    parts = [whole(x[:, c : c + 1], case.size_of(c)) for c in range(case.shape[1])]
    return torch.cat(parts, dim=1)


def _max_pool_peer(work: Work, name: str, *, by_axis: bool, slow: bool) -> Peer:
    peer = _differentiable(work, name, partial(_pooled, work, by_axis=by_axis), slow=slow)
    if work.case.dtype == "float32":
        return peer
    # Ties, which are broken otherwise, leave its gradient unchecked.
    return Peer(name, peer.forward, slow=slow)


def _max_pool(work: Work) -> Peer:
    _need_box(work)
    kind, comparisons = work.device.type, work.case.comparisons
    if comparisons > _MOST_COMPARISONS[kind]:
        raise LeftOutError("a call takes minutes")
    slow = comparisons > _SLOW_COMPARISONS[kind]
    return _max_pool_peer(work, "max_pool", by_axis=False, slow=slow)


def _max_pool_by_axis(work: Work) -> Peer:
    _need_box(work)
    return _max_pool_peer(work, "max_pool_by_axis", by_axis=True, slow=False)


def _need_few(work: Work, sizes: tuple[int, ...]) -> None:
    """Contenders that take seconds are measured on few rows."""
    case = work.case
    if case.element != "box" or len(case.sizes) > 1 or case.sizes[0] not in sizes:
        raise LeftOutError(f"slow, only boxes of {' and '.join(map(str, sizes))}")


def _kornia(work: Work) -> Peer:
    name = "kornia"
    case = work.case
    if case.axes != 2:
        raise LeftOutError(f"{name} has no volumes")
    if case.dtype != "float32":
        raise LeftOutError(f"{name} is compared in float32")
    if len(case.sizes) > 1:
        raise LeftOutError(f"{name} has one element for all channels")
    if work.device.type == "cpu":
        _need_few(work, (3,) if case.one_thread else _SLOW_SIZES)
    module = _imported("kornia.morphology", name)
    needed = _KORNIA_COPIES * case.bytes * case.sizes[0] ** case.axes
    available = available_bytes(work.device)
    if needed > available:
        raise LeftOutError(f"needs {needed / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are left")
    box = torch.ones(case.sizes[0], case.sizes[0])
    kernel = (box if work.footprint is None else work.footprint).to(work.x)
    operation = getattr(module, case.operation)
    return _differentiable(work, name, lambda x: operation(x, kernel), slow=True)


def _scipy(work: Work) -> Peer:
    name = "SciPy"
    _need_cpu(work, name)
    _need_float32(work, name)
    _need_few(work, _SLOW_SIZES)
    module = _imported("scipy.ndimage", name)
    names = {"closing": "grey_closing", "dilation": "grey_dilation"}
    operation = getattr(module, names[work.case.operation])
    size = (work.case.sizes[0],) * work.case.axes
    images, out = work.x.flatten(0, 1).numpy(), torch.empty_like(work.x)
    targets = out.flatten(0, 1).numpy()

    def forward() -> torch.Tensor:
        for image, target in zip(images, targets, strict=True):
            operation(image, size=size, output=target, mode="nearest")
        return out

    return Peer("scipy", forward, slow=True, border="nearest")


# By name; each raises LeftOutError where it takes no part.
PEERS: dict[str, Callable[[Work], Peer]] = {
    "opencv": _opencv,
    "opencv_pool": _opencv_pool,
    "max_pool": _max_pool,
    "max_pool_by_axis": _max_pool_by_axis,
    "kornia": _kornia,
    "scipy": _scipy,
}


@contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch, dpfast and OpenCV on so many threads."""
    try:
        cv2: Any = importlib.import_module("cv2")
    except ImportError:
        cv2 = None
    before = torch.get_num_threads()
    opencv_before = cv2.getNumThreads() if cv2 else 0
    torch.set_num_threads(count)
    if cv2:
        cv2.setNumThreads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if cv2:
            cv2.setNumThreads(opencv_before)
